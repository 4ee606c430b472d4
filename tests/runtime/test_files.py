"""Files that appear whole: what a killed process left of one is swept, what another is writing is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tandemrt.runtime.files import sweep_parts, write_whole


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up after it."""


def test_what_a_killed_writer_left_is_swept_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(stream: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        write_whole(tmp_path / "kernels.bin", killed)
    (part,) = tmp_path.iterdir()
    kept = [tmp_path / name for name in ("engine.plan", ".other.part", "a.part")]
    for path in kept:
        path.write_bytes(b"")
    sweep_parts(tmp_path)
    assert part.exists()  # it may be another process's, at work
    long_ago = time.time() - 3600
    for path in (part, *kept):
        os.utime(path, (long_ago, long_ago))
    sweep_parts(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_is_not_there_has_nothing_to_sweep(tmp_path: Path) -> None:
    sweep_parts(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, lambda stream: stream.write(b"table"))
        assert os.read(reader, 100) == b"table"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
