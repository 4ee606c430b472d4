"""Pictures: rounding as diffusers rounds, and PNG files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from tandemrt.runtime.images import image_from_pixels, pixels_from_decoded, save_png


def test_pixels_equal_diffusers() -> None:
    decoded = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    ours = [np.asarray(image_from_pixels(pixels)) for pixels in pixels_from_decoded(decoded)]
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded))
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, np.asarray(reference))


def test_png_carries_its_facts(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    save_png(image, tmp_path / "a.png", {"prompt": "ein grüner Stern ☆", "seed": "7"})
    with Image.open(tmp_path / "a.png") as read:
        assert read.text == {"prompt": "ein grüner Stern ☆", "seed": "7"}  # type: ignore[attr-defined]
        assert read.getpixel((0, 0)) == (1, 2, 3)


def test_a_picture_follows_the_umask_and_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_when_synced = []
    monkeypatch.setattr(os, "fsync", lambda _: named_when_synced.append((tmp_path / "a.png").exists()))
    before = os.umask(0o027)
    try:
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640
    assert named_when_synced == [False]


@pytest.mark.parametrize("links", [True, False])
def test_without_replace_a_name_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {}, replace=False)
    before = (tmp_path / "a.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    with pytest.raises(FileExistsError):
        save_png(Image.new("RGB", (9, 9)), tmp_path / "a.png", {}, replace=False)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_name_that_was_taken_for_nothing_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="not permitted"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {}, replace=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_picture_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(Image.new("RGB", (8, 8), (1, 2, 3)), tmp_path / "a.png", {})
    before = (tmp_path / "a.png").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
