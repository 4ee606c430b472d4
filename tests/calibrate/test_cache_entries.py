"""What calibrations keep in the cache goes when nothing has used it for long, and nothing else does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tandemrt.calibrate.cache_entries import UNUSED_DAYS, Kind, entry_of, sweep_unused
from tandemrt.calibrate.ledger import Ledger

DAY_S = 24 * 3600


def age(path: Path, days: float) -> None:
    """Make it so many days old, with all that is in it."""
    for one in (*path.rglob("*"), path):
        os.utime(one, (time.time() - days * DAY_S,) * 2)


def folder(cache: Path, kind: Kind, name: str, days: float) -> Path:
    """An entry with a ledger."""
    entry = entry_of(cache, kind, {"name": name})
    with Ledger(entry / "found.jsonl", {"name": name}) as ledger:
        ledger.put("first", 1)
    age(entry, days)
    return entry


def file(cache: Path, name: str, days: float) -> Path:
    entry = entry_of(cache, "ranges", {"name": name}, ".npz")
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.touch()
    age(entry, days)
    return entry


def test_an_entry_lies_by_all_that_it_rests_on(tmp_path: Path) -> None:
    one, same, other = (entry_of(tmp_path, "splits", ground) for ground in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {}))
    assert one == same != other
    assert one.parent == tmp_path / "splits"


def test_what_was_not_used_for_long_goes(tmp_path: Path) -> None:
    old = [folder(tmp_path, "quantize", "old", UNUSED_DAYS + 1), folder(tmp_path, "splits", "old", UNUSED_DAYS + 1)]
    old.append(file(tmp_path, "old", UNUSED_DAYS + 1))
    kept = [folder(tmp_path, "quantize", "new", UNUSED_DAYS - 1), file(tmp_path, "new", UNUSED_DAYS - 1)]
    written = folder(tmp_path, "splits", "written", UNUSED_DAYS + 1)
    os.utime(written / "found.jsonl")  # the folder itself is as old as its first file
    sweep_unused(tmp_path)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in (*kept, written))


def test_what_is_used_now_stays_and_counts_as_used(tmp_path: Path) -> None:
    mine = [folder(tmp_path, "quantize", "mine", UNUSED_DAYS + 1), file(tmp_path, "mine", UNUSED_DAYS + 1)]
    sweep_unused(tmp_path, *mine, entry_of(tmp_path, "splits", {"name": "none yet"}))
    sweep_unused(tmp_path)
    assert all(path.exists() for path in mine)


def test_what_another_process_has_stays(tmp_path: Path) -> None:
    theirs = folder(tmp_path, "quantize", "theirs", 0)
    with Ledger(theirs / "found.jsonl", {"name": "theirs"}):
        age(theirs, UNUSED_DAYS + 1)
        sweep_unused(tmp_path)
        assert theirs.exists()
    sweep_unused(tmp_path)
    assert not theirs.exists()


def test_nothing_else_in_the_cache_is_touched(tmp_path: Path) -> None:
    engine = tmp_path / "engines" / entry_of(tmp_path, "splits", {}).name
    notes = tmp_path / "splits" / "notes"
    for path in (engine, notes):
        path.mkdir(parents=True)
        age(path, UNUSED_DAYS + 1)
    sweep_unused(tmp_path)
    sweep_unused(tmp_path / "none")
    assert engine.exists() and notes.exists()


def test_a_ledger_that_is_swept_while_it_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its lock: what is put is not written to a file that has no name."""
    entry, lock = folder(tmp_path, "splits", "mine", UNUSED_DAYS + 1), Ledger._lock
    swept = []

    def late(self: Ledger, held: object) -> None:
        if not swept:
            sweep_unused(tmp_path)
            swept.append(not entry.exists())
        lock(self, held)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "_lock", late)
    with Ledger(entry / "found.jsonl", {"name": "mine"}) as ledger:
        assert ledger.get("first") is None
        ledger.put("second", 2)
    assert swept == [True]
    with Ledger(entry / "found.jsonl", {"name": "mine"}) as ledger:
        assert ledger.get("second") == 2
