"""Publishing: whole or not at all, through full disks, races and kills."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandemrt.runtime import staging as module
from tandemrt.runtime.errors import ExportError
from tandemrt.runtime.manifest import (
    FORMAT,
    Defaults,
    FileRecord,
    LatentSpace,
    Manifest,
    SchedulerDefaults,
    TextConditioning,
    TextEncoding,
)
from tandemrt.runtime.manifest_files import MANIFEST_NAME, SEAL_NAME, decode, encode
from tandemrt.runtime.staging import Staging, require_free

FILES = 60


def manifest(text: str, *files: str) -> str:
    """A manifest of these files; what they hold is not of publishing's concern."""
    return encode(
        Manifest(
            format=FORMAT,
            producers={"generation": text},
            components={},
            files={name: FileRecord(size=0, sha256="") for name in files},
            latent=LatentSpace(channels=4, downsampling=8, scaling_factor=1.0),
            text=TextConditioning(encoders={"text_encoder": TextEncoding(max_length=24, width=16)}, width=16),
            scheduler=SchedulerDefaults(class_name="DDIMScheduler", config={}),
            defaults=Defaults(height=64, width=64),
        )
    ).decode()


# Publishes generation after generation, each FILES files and a manifest that all hold the generation's number.
PUBLISHER = f"""
import sys
from pathlib import Path
from tandemrt.runtime.staging import Staging
out, manifest = Path(sys.argv[1]), sys.argv[2]
for generation in range(1, 10_000):
    with Staging(out, force=True) as staging:
        for index in range({FILES}):
            (staging.folder / f"{{index}}.txt").write_text(str(generation))
        (staging.folder / "{MANIFEST_NAME}").write_text(manifest.replace("GENERATION", str(generation)))
        staging.publish()
    print(generation, flush=True)
"""


def put(out: Path, text: str, *, force: bool = False) -> None:
    with Staging(out, force=force) as staging:
        (staging.folder / MANIFEST_NAME).write_text(manifest(text))
        staging.publish()


def published(out: Path) -> str:
    return decode((out / MANIFEST_NAME).read_bytes(), "").producers["generation"]


def test_a_folder_appears_with_publish_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with Staging(out, force=False) as staging:
        (staging.folder / MANIFEST_NAME).write_text(manifest("1"))
        assert not out.exists()
        assert staging.folder.parent == out.parent
        staging.publish()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert published(out) == "1"


def test_an_error_before_publish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out", force=False) as staging:
        (staging.folder / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_without_force(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    with pytest.raises(ExportError, match=r"out: exists already.*--force"):
        put(tmp_path / "out", "new")
    assert published(tmp_path / "out") == "old"


@pytest.mark.parametrize("exchanges", [True, False])
def test_force_replaces_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    put(tmp_path / "out", "old")
    put(tmp_path / "out", "new", force=True)
    assert published(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder with other things", "file", "link to a bundle"])
def test_force_replaces_nothing_but_bundles(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "link to a bundle":
        put(tmp_path / "bundle", "precious")
        out.symlink_to(tmp_path / "bundle")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="exists and is no bundle, so --force does not replace it"):
        put(out, "new", force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("foreign", ["thesis.txt", "unet/notes.txt", "mine/thesis.txt", "empty"])
def test_force_does_not_take_what_is_not_of_the_bundle(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    (out / "unet").mkdir(parents=True)
    (out / MANIFEST_NAME).write_text(manifest("old", "unet/model.onnx"))
    for name in (SEAL_NAME, "unet/model.onnx"):
        (out / name).touch()
    kept = out / foreign
    if foreign == "empty":
        kept.mkdir()
    else:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("precious")
    first = "mine" if foreign == "mine/thesis.txt" else foreign
    with pytest.raises(ExportError, match=rf"out/{first}: is not of the bundle, so --force does not remove it"):
        put(out, "new", force=True)
    assert published(out) == "old"
    assert kept.exists()
    shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    shutil.rmtree(out / "mine", ignore_errors=True)
    put(out, "new", force=True)
    assert published(out) == "new"


def test_force_does_not_replace_a_bundle_whose_files_it_cannot_tell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST_NAME).write_text('{"format": 99}')
    with pytest.raises(ExportError, match=r"which of its files are a bundle's .*got 99.*Remove the folder by hand"):
        put(out, "new", force=True)
    assert (out / MANIFEST_NAME).read_text() == '{"format": 99}'


def test_nothing_is_put_inside_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "bundle", "old")
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    for out in (tmp_path / "bundle" / "sub" / "x", tmp_path / "link" / "x"):
        with pytest.raises(ExportError, match=r"x: lies inside the bundle .*/bundle, which it would break"):
            put(out, "new")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == [MANIFEST_NAME]
    monkeypatch.chdir(tmp_path / "bundle")
    require_free(Path(), force=True)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_failing_swap_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    put(tmp_path / "out", "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if module._PART in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    def refuse_exchange(one: Path, other: Path) -> bool:
        if exchanges:
            raise OSError(errno.EIO, "Input/output error")
        return False

    monkeypatch.setattr(module, "_exchange", refuse_exchange)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="Input/output error"):
        put(tmp_path / "out", "new", force=True)
    assert published(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_swap_killed_half_way_is_undone_by_the_next_run(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f".out{module._OLD}1234")
    with pytest.raises(ExportError, match="exists already"):
        put(tmp_path / "out", "new")
    assert published(tmp_path / "out") == "old"


@pytest.mark.parametrize("parent", ["file/out", "/proc/out"])
def test_a_parent_that_cannot_be_written_is_one_line(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"cannot be written \(.+\)\. Give a folder that can be written\.$") as caught:
        put(tmp_path / parent, "new")
    assert len(str(caught.value).splitlines()) == 1


def test_a_full_disk_at_the_last_flush_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"cannot be written \(No space left on device\)\. Free space"):
        put(tmp_path / "out", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def unsupported(descriptor: int, operation: int) -> None:
        made.append(descriptor)
        if len(made) > 3:
            pytest.fail("tried again and again")
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / f".other{module._PART}dead").mkdir()
    with pytest.raises(ExportError, match=r"deep/out: cannot be written \(No locks available\)"):
        put(tmp_path / "deep" / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == [f".other{module._PART}dead"]


def test_parents_that_were_made_go_where_nothing_is_published(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "kept" / "a" / "b" / "out", force=False):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = tmp_path / f".other{module._PART}dead"
    dead.mkdir()
    (dead / "model.onnx").touch()
    with Staging(tmp_path / "out", force=False) as living:
        put(tmp_path / "second", "2")
        assert living.folder.exists()
        assert not dead.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


@pytest.mark.parametrize("seed", range(6))
def test_kill_at_any_moment_leaves_a_whole_bundle(tmp_path: Path, seed: int) -> None:
    """A publisher that replaces one bundle over and over is killed; what is there then is one generation, whole."""
    out = tmp_path / "out"
    put(out, "0")
    names = [f"{index}.txt" for index in range(FILES)]
    arguments = [sys.executable, "-c", PUBLISHER, str(out), manifest("GENERATION", *names)]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.15))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    texts = [(out / name).read_text() for name in names]
    assert set(texts) == {published(out)}
    put(out, "after", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
