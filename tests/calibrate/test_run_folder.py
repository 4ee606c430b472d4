"""A folder of files and their ledger: what is a run's own is known at any moment, and nothing else is touched."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

from tandemrt.calibrate.run_folder import RunFolder
from tandemrt.runtime.cli.reporter import ConsoleReporter
from tandemrt.runtime.errors import ArgumentError

NAMES = ("0.bin", "1.bin", "2.bin")


def folder_at(path: Path, *, discard: bool = False) -> RunFolder:
    return RunFolder(path, "run.jsonl", r"[0-9]\.bin", {"seed": 1}, discard=discard)


def missing(folder: RunFolder) -> tuple[list[int], str]:
    told = StringIO()
    return folder.missing(NAMES, "files", ConsoleReporter(StringIO(), told)), told.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with folder_at(tmp_path / "out") as folder:
        assert missing(folder) == ([0, 1, 2], "")
        for name in NAMES:
            folder.add(name, name.encode(), {"of": name})
    return tmp_path / "out"


def test_what_is_there_and_whole_is_not_made_again(path: Path) -> None:
    (path / "1.bin").write_bytes(b"1.Bin")
    (path / "2.bin").unlink()
    assert list(folder_at(path).there()) == ["0.bin"]
    with folder_at(path) as folder:
        indices, told = missing(folder)
        assert indices == [1, 2]
        assert "1.bin: missing or damaged, it is made again" in told
        assert "goes on with 1 of 3 files there" in told
        assert folder.found["1.bin"]["of"] == "1.bin"


def test_a_file_s_line_is_there_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a process killed between the two would leave a file that nobody knows for the run's."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with folder_at(tmp_path) as folder:
        monkeypatch.setattr("tandemrt.calibrate.run_folder.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.add("0.bin", b"x", {})
        assert list(folder.found) == ["0.bin"]
        assert missing(folder)[0] == [0, 1, 2]


def test_a_file_of_somebody_else_stops_a_run_before_it_makes_anything(path: Path) -> None:
    (path / "run.jsonl").write_bytes((path / "run.jsonl").read_bytes().splitlines(keepends=True)[0])
    with folder_at(path) as folder, pytest.raises(ArgumentError, match=r"0\.bin: is there, and not of this run"):
        missing(folder)


@pytest.mark.parametrize("damage", [b"", b"nothing\n"])
def test_discarding_removes_the_run_s_files_alone(path: Path, tmp_path: Path, damage: bytes) -> None:
    """Those that its ledger has, also where a line of it is damaged, and never what lies elsewhere."""
    for name in ("9.bin", "notes.txt"):
        (path / name).write_bytes(b"mine")
    (tmp_path / "1.bin").write_bytes(b"mine")
    with (path / "run.jsonl").open("ab") as ledger:
        ledger.write(b'{"../1.bin": {}}\n{"notes.txt": {}}\n' + damage)
    with folder_at(path, discard=True) as folder:
        assert folder.found == {}
    assert sorted(one.name for one in path.iterdir()) == ["9.bin", "notes.txt", "run.jsonl"]
    assert (tmp_path / "1.bin").read_bytes() == b"mine"
