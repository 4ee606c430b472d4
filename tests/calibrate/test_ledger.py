"""A ledger: what was put is there again, a torn line is not, and another run's is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandemrt.calibrate.ledger import Ledger, read_ledger
from tandemrt.runtime.errors import ArgumentError, CalibrationError, TandemError

GROUND = {"bundle": "a" * 64, "seed": 0, "pair": (1, 2), "versions": {"tandemrt": "1", "onnxruntime": "2"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Ledger(tmp_path / "out" / "some.jsonl", GROUND) as ledger:
        ledger.put("first", {"value": 1})
        ledger.put("second", [1.5, None])
    return tmp_path / "out" / "some.jsonl"


def test_it_goes_on(path: Path) -> None:
    with Ledger(path, GROUND) as ledger:
        assert (len(ledger), list(ledger)) == (2, ["first", "second"])
        assert ledger.get("first") == {"value": 1}
        assert ledger.get("third") is None
        ledger.put("third", (3,))
        assert ledger.get("third") == [3]
    with Ledger(path, GROUND) as ledger:
        assert ledger.get("third") == [3]


def test_the_last_that_was_put_counts_and_the_same_is_written_once(path: Path) -> None:
    before = path.read_bytes()
    with Ledger(path, GROUND) as ledger:
        ledger.put("first", {"value": 1})
        assert path.read_bytes() == before
        ledger.put("first", {"value": 2})
    found = read_ledger(path)
    assert found is not None
    assert found[1] == {"first": {"value": 2}, "second": [1.5, None]}


def test_wherever_it_was_cut_it_goes_on(path: Path) -> None:
    """As when the process was killed while it wrote, the first line too."""
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Ledger(path, GROUND) as ledger:
            assert len(ledger) == max(whole[:size].count(b"\n") - 1, 0)
            ledger.put("first", {"value": 1})
            ledger.put("second", [1.5, None])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"pair": (1, 3)}, "pair, number 2, is 2 there, 3 here"),
        ({"pair": ()}, "pair are 2 there, 0 here"),
        (
            {"versions": {"tandemrt": "1", "onnxruntime": "3"}},
            "another run: versions onnxruntime is '2' there, '3' here",
        ),
        ({"more": "x", "seed": 1}, "seed is 0 there, 1 here; more is None there, 'x' here"),
    ],
)
def test_another_run_is_refused_and_discarded_on_purpose(path: Path, change: dict[str, Any], words: str) -> None:
    other, before = {**GROUND, **change}, path.read_bytes()
    with pytest.raises(ArgumentError, match=rf"{words}\. Give.*--discard"), Ledger(path, other):
        pass
    assert path.read_bytes() == before
    for discard in (True, False):
        with Ledger(path, other, discard=discard) as ledger:
            assert len(ledger) == 0


@pytest.mark.parametrize("content", [b"\x00\xff\n", b"[1]\n", b"{'a': 1}\n", b"[" * 100_000 + b"\n", b"my notes"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match="not what a run left"), Ledger(tmp_path / "some.jsonl", GROUND):
        pass
    assert (tmp_path / "some.jsonl").read_bytes() == content


def test_one_process_at_a_time(path: Path) -> None:
    before = path.read_bytes()
    for discard in (False, True):
        with (
            Ledger(path, GROUND),
            pytest.raises(CalibrationError, match="another run is writing it"),
            Ledger(path, GROUND, discard=discard),
        ):
            pass
        assert path.read_bytes() == before


def test_a_file_that_another_process_made_meanwhile_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether it is there and its opening, another one has made and filled it."""
    path, made = tmp_path / "some.jsonl", False
    real_open, real_exists = os.open, Path.exists

    def fill() -> None:
        nonlocal made
        if not made:
            made = True
            with Ledger(path, GROUND) as other:
                other.put("first", 1)

    def late_open(name: Any, *rest: Any, **options: Any) -> int:
        if Path(name) == path:
            fill()
        return real_open(name, *rest, **options)

    def early_look(self: Path) -> bool:
        there = real_exists(self)
        if self == path and not there:
            fill()
        return there

    monkeypatch.setattr(os, "open", late_open)
    monkeypatch.setattr(Path, "exists", early_look)
    with Ledger(path, GROUND) as ledger:
        assert ledger.get("first") == 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tandemrt.calibrate.ledger import Ledger
from tandemrt.runtime.errors import TandemError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
try:
    with Ledger(path, {"a": 1}) as ledger:
        ledger.put("first", "x" * 100)
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, size + 50))
        try:
            ledger.put("second", "y" * 100)
        except TandemError as error:
            print(error)
        assert path.stat().st_size == size
        ledger.put("third", 3)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """Leaving is silent then: what stopped the run is what is told."""
    path = tmp_path / "some.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    told = done.stdout.splitlines()
    assert (done.stderr, done.returncode, len(told)) == ("", 0, 2)
    assert "some.jsonl: cannot be written (File too large)" in told[0]
    assert told[1] == "interrupted"
    assert read_ledger(path) == ({"a": 1}, {"first": "x" * 100, "third": 3})


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TandemError, match=r"cannot be written .*another --out"), Ledger(tmp_path / "file/x", GROUND):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    told = r"some\.jsonl: cannot be locked against other runs \(No locks available\)\. Give another --out"
    with pytest.raises(CalibrationError, match=told):
        Ledger(tmp_path / "some.jsonl", GROUND).__enter__()
    with pytest.raises(CalibrationError, match=r"\. Give another --cache, on a file system"):
        Ledger(tmp_path / "some.jsonl", GROUND, option="--cache").__enter__()
