"""What a calibration found becomes part of a bundle, or nothing changes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from io import FileIO
from pathlib import Path

import msgspec
import pytest

from tandemrt.calibrate.stored import require_storable, store
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.files import locked
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.manifest_files import MANIFEST_NAME

from ..runtime.tiny_bundle import resign, write_tiny_bundle

SPLIT = (("unet", 4), ("unet_small", 6))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_tiny_bundle(tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def with_defaults(manifest: Manifest, **changes: object) -> Manifest:
    return msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, **changes))


def test_what_is_stored_is_what_runs_by_default(bundle: Bundle) -> None:
    stored = store(bundle, lambda manifest: with_defaults(manifest, steps=SPLIT))
    assert stored == Bundle.open(bundle.path) != bundle
    with Pipeline.open(bundle.path, threads=1) as pipe:
        output = pipe("a blue red", seed=1, output_type="latent")
    assert output.plan.steps == SPLIT


def test_two_calibrations_keep_what_each_other_stored(bundle: Bundle) -> None:
    store(bundle, lambda manifest: with_defaults(manifest, steps=SPLIT))
    store(bundle, lambda manifest: with_defaults(manifest, guidance_scale=3.0))
    defaults = Bundle.open(bundle.path).manifest.defaults
    assert (defaults.steps, defaults.guidance_scale) == (SPLIT, 3.0)


def test_engines_are_those_of_the_bundle_as_it_is_then(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build-engine", str(bundle.path), "--target", "onnxruntime:cpu", "--component", "unet", "--json"]
    build += ["--cache", str(tmp_path / "cache")]
    assert main(build) == 0
    store(bundle, lambda manifest: with_defaults(manifest, steps=SPLIT))
    capsys.readouterr()
    assert main([*build, "--explain"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["cached"]


@pytest.mark.parametrize("steps", [(("unet", 9),), (("unet_large", 10),)])
def test_a_manifest_that_could_not_be_used_is_not_stored(bundle: Bundle, steps: object) -> None:
    with pytest.raises(BundleError, match=r"defaults\.steps"):
        store(bundle, lambda manifest: with_defaults(manifest, steps=steps))
    assert Bundle.open(bundle.path) == bundle


def test_a_bundle_of_other_files_is_left_alone(bundle: Bundle) -> None:
    (bundle.path / "model_index.json").write_text("{}")
    resign(bundle.path)
    with pytest.raises(BundleError, match="lists other files than when it was opened"):
        store(bundle, lambda manifest: with_defaults(manifest, steps=SPLIT))


def test_a_folder_that_cannot_be_written_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BundleError, match=r"cannot be written \(No space left on device\)"):
        store(bundle, lambda manifest: with_defaults(manifest, steps=SPLIT))
    monkeypatch.undo()
    assert Bundle.open(bundle.path) == bundle
    assert [path.name for path in bundle.path.glob(".*")] == []
    assert (bundle.path / MANIFEST_NAME).is_file()


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """EBADF is what NFS says of a folder."""

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    told = r"against other processes .* file system that knows locks"
    with pytest.raises(BundleError, match=told):
        store(bundle, lambda manifest: with_defaults(manifest, steps=SPLIT))
    with pytest.raises(BundleError, match=told):
        require_storable(bundle)
    assert Bundle.open(bundle.path) == bundle


def test_what_can_be_stored_is_known_beforehand(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while another process stores something, which is waited for later."""
    with locked(bundle.path):
        require_storable(bundle)
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle.path)
    with pytest.raises(BundleError, match=r"tandem\.json: cannot be written \(Permission denied\)"):
        require_storable(bundle)


COMMANDS = {
    "split": ("--budget", "0.6"),
    "guidance": ("--held-out", "judged.txt", "--store"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_measured_that_could_not_be_stored(
    bundle: Bundle, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files can be locked there, and folders cannot, as on NFS."""
    flock = fcntl.flock

    def of_files(descriptor: int | FileIO, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno()).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    folder = bundle.path.parent
    monkeypatch.chdir(folder)
    (folder / "prompts.txt").write_text("red\n")
    (folder / "judged.txt").write_text("blue\n")
    monkeypatch.setattr(fcntl, "flock", of_files)
    given = ["calibrate", command, str(bundle.path), "--prompts", "prompts.txt", "--out", "out"]
    assert main([*given, "--target", "onnxruntime:cpu", *COMMANDS[command]]) == 1
    assert "tandem.json: its folder cannot be locked against other processes" in capsys.readouterr().err
    assert not (folder / "out").exists()
