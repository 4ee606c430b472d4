"""Bundles made of others: whole or not at all, and the one they are made of stays what it was."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from tandemrt.calibrate.derived import Derived
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import ArgumentError, BundleError, ExportError
from tandemrt.runtime.manifest import Loss, Quantization

from ..runtime.tiny_bundle import resign, write_tiny_bundle

QUANTIZATION = Quantization(
    format="int8-weights", tool="test", version="1", settings={}, layers=1, float_model="ab" * 32
)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_tiny_bundle(tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_a_graph_takes_the_place_of_another(bundle: Bundle, tmp_path: Path) -> None:
    other = (bundle.path / "unet_small" / "model.onnx").read_bytes()

    def make(out: Path) -> Quantization:
        assert [path.name for path in out.parent.iterdir()] == []  # the weights of the graph before are gone
        out.write_bytes(other)
        return QUANTIZATION

    loss = Loss(
        psnr_db=40.0, worst_psnr_db=38.0, ssim=0.99, latent_error=0.01, bundle=bundle.digest, prompts=1,
        prompts_sha256="cd" * 32, seed=0, painted="unet 2",
    )  # fmt: skip
    out = tmp_path / "deep" / "out"
    with Derived(bundle, out, force=False) as derived:
        derived.replace("unet", make)
        assert derived.opened().component("unet").quantization == QUANTIZATION
        derived.restore("unet")
        restored = derived.opened().manifest
        assert restored.components == bundle.manifest.components
        assert restored.files == bundle.manifest.files
        derived.replace("unet", make)
        derived.tell("unet", [loss])
        assert not out.exists()
        made = derived.publish()
    quantization = made.component("unet").quantization
    assert quantization is not None
    assert quantization.losses == (loss,)
    assert made.component("unet").evidence == ()
    assert made.component("unet_small") == bundle.component("unet_small")
    assert not (out / "unet" / "model.onnx.data").exists()
    with Pipeline.open(out, threads=1) as new, Pipeline.open(bundle.path, threads=1) as old:
        images = [pipe("red", steps=steps, seed=1, output_type="np").images[0] for pipe, steps in
                  ((new, {"unet": 2}), (old, {"unet_small": 2}))]  # fmt: skip
    assert (images[0] == images[1]).all()
    assert Bundle.open(bundle.path) == bundle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "deep"]


def test_an_interrupted_one_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Derived(bundle, tmp_path / "out", force=False) as derived:
        assert derived.folder.exists()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("when", ["copying", "writing"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: object) -> Quantization:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "copying":
        monkeypatch.setattr(shutil, "copyfile", full)
    told = pytest.raises(ExportError, match=r"cannot be written \(No space left on device\)\. Free space")
    with told, Derived(bundle, tmp_path / "out", force=False) as derived:
        derived.replace("unet", full)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_place_that_is_taken_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "out")
    with (
        pytest.raises(ExportError, match=r"out: exists already.*--force"),
        Derived(bundle, tmp_path / "out", force=False),
    ):
        pytest.fail("it was taken")
    assert Bundle.open(tmp_path / "out").digest == bundle.digest


def test_the_bundle_itself_is_never_replaced(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    for out in (bundle.path, bundle.path.parent / "." / bundle.path.name, tmp_path / "link"):
        with pytest.raises(ArgumentError, match="--out: the bundle that it is made of, got"):
            Derived(bundle, out, force=True)
    assert Bundle.open(bundle.path) == bundle


def test_files_that_two_components_share_are_not_replaced(bundle: Bundle, tmp_path: Path) -> None:
    other = bundle.path / "unet" / "second.onnx"
    shutil.copyfile(bundle.path / "unet" / "model.onnx", other)
    shutil.rmtree(bundle.path / "unet_small")

    def second(manifest):  # type: ignore[no-untyped-def]
        import msgspec  # noqa: PLC0415

        small = msgspec.structs.replace(manifest.components["unet"], model="unet/second.onnx")
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet_small": small})

    resign(bundle.path, second)
    told = pytest.raises(BundleError, match="unet and unet_small share a file of weights")
    with told, Derived(Bundle.open(bundle.path), tmp_path / "out", force=False) as derived:
        derived.replace("unet", lambda path: QUANTIZATION)
