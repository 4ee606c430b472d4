"""Publishing: whole or not at all, through full disks, races and kills."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandemrt.export import publish
from tandemrt.export.publish import Staging
from tandemrt.runtime.errors import ExportError
from tandemrt.runtime.manifest import MANIFEST_NAME

FILES = 60
# Publishes generation after generation, each FILES files that all hold the generation's number.
PUBLISHER = f"""
import sys
from pathlib import Path
from tandemrt.export.publish import Staging
out = Path(sys.argv[1])
for generation in range(1, 10_000):
    with Staging(out, force=True) as staging:
        for index in range({FILES}):
            (staging.folder / f"{{index}}.txt").write_text(str(generation))
        (staging.folder / "{MANIFEST_NAME}").write_text(str(generation))
        staging.publish()
    print(generation, flush=True)
"""


def put(out: Path, text: str, *, force: bool = False) -> None:
    with Staging(out, force=force) as staging:
        (staging.folder / MANIFEST_NAME).write_text(text)
        staging.publish()


def test_a_folder_appears_with_publish_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with Staging(out, force=False) as staging:
        (staging.folder / MANIFEST_NAME).write_text("1")
        assert not out.exists()
        assert staging.folder.parent == out.parent
        staging.publish()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / MANIFEST_NAME).read_text() == "1"


def test_an_error_before_publish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path / "out", force=False) as staging:
        (staging.folder / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_without_force(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    with pytest.raises(ExportError, match=r"out: exists already.*--force"):
        put(tmp_path / "out", "new")
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "old"


@pytest.mark.parametrize("exchanges", [True, False])
def test_force_replaces_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    put(tmp_path / "out", "old")
    put(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "new"
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


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_failing_swap_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    put(tmp_path / "out", "old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if publish._PART in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    def refuse_exchange(one: Path, other: Path) -> bool:
        if exchanges:
            raise OSError(errno.EIO, "Input/output error")
        return False

    monkeypatch.setattr(publish, "_exchange", refuse_exchange)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="Input/output error"):
        put(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_swap_killed_half_way_is_undone_by_the_next_run(tmp_path: Path) -> None:
    put(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f".out{publish._OLD}1234")
    with pytest.raises(ExportError, match="exists already"):
        put(tmp_path / "out", "new")
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "old"


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


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = tmp_path / f".other{publish._PART}dead"
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
    child = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.15))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    texts = [path.read_text() for path in out.iterdir()]
    assert len(texts) == FILES + 1
    assert len(set(texts)) == 1
    put(out, "after", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
