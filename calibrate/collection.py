"""The folder that trajectories are collected into: what of it is there, and whether it goes on or begins anew."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.files import sweep_parts
from .ledger import writing
from .trajectories import RECORD_NAME, Record, is_whole, read_record, write_record

_FILES = "prompt-[0-9][0-9][0-9][0-9][0-9].safetensors"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and hold it against other runs that write to it.

    Raises:
        CalibrationError: another run has it.
        TandemError: it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another run writes to it"
            raise CalibrationError(str(folder), what, remedy="Wait for its end.") from error
        yield
    finally:
        os.close(held)


def begun(folder: Path, wanted: Record, *, discard: bool, warn: Callable[[str], None]) -> Record:
    """The record to go on with, of files that are there and whole; what is there otherwise is removed.

    discard: whether to begin anew in any case. warn: told of files that are not what they were.

    Raises:
        ArgumentError, CalibrationError: as `there`.
        TandemError: the folder cannot be written.
    """
    sweep_parts(folder)
    found = None if discard else there(folder, wanted)
    if found is None:
        with writing(folder):
            _empty(folder)
            write_record(folder, wanted)
        return wanted
    whole = {name: kept for name, kept in found.files.items() if is_whole(folder / name, kept)}
    for name in sorted(found.files.keys() - whole.keys()):
        warn(f"{folder / name}: missing or damaged, its prompt is painted again")
    return msgspec.structs.replace(found, files=whole)


def there(folder: Path, wanted: Record) -> Record | None:
    """What a folder holds, collected in the same way; None where it holds nothing.

    Raises:
        ArgumentError: it holds something else, or what was collected in another way.
        CalibrationError: its record is damaged.
    """
    found = read_record(folder)
    if found is None:
        _require_own(folder)
        return None
    differing = _differences(found[0], wanted)
    if differing:
        remedy = "Give the same arguments to go on, another --out, or --discard to start over."
        raise ArgumentError(str(folder), f"holds what was collected otherwise: {'; '.join(differing)}", remedy=remedy)
    return found[0]


def _differences(found: Record, wanted: Record) -> list[str]:
    """What decides the content of two records' files and differs, in words."""
    pairs: dict[str, tuple[object, object]] = {"bundle": (found.bundle, wanted.bundle)}
    for then, now in ((found.settings, wanted.settings), (found.versions, wanted.versions)):
        pairs |= {name: (then.get(name), now.get(name)) for name in {**now, **then}}
    differing = [f"{name} is {then!r} there, {now!r} here" for name, (then, now) in pairs.items() if then != now]
    if len(found.prompts) != len(wanted.prompts):
        differing.append(f"there are {len(found.prompts)} prompts there, {len(wanted.prompts)} here")
    both = enumerate(zip(found.prompts, wanted.prompts, strict=False), start=1)
    other = next(((at, then, now) for at, (then, now) in both if then != now), None)
    if other is not None:
        differing.append(f"prompt {other[0]} is {other[1][:80]!r} there, {other[2][:80]!r} here")
    return differing


def _require_own(folder: Path) -> None:
    """Raise ArgumentError where a folder holds files that are not of a collection."""
    if not folder.is_dir():
        return
    other = next((path.name for path in sorted(folder.iterdir()) if not _is_own(path)), None)
    if other is not None:
        what = f"holds other files and no {RECORD_NAME}"
        raise ArgumentError(str(folder), what, got=other, expected="a new folder, or one of trajectories")


def _is_own(path: Path) -> bool:
    return path.name == RECORD_NAME or path.match(_FILES) or path.match(".*.part")


def _empty(folder: Path) -> None:
    """Remove what was collected, the record first: without it nothing takes the files for a collection's.

    Raises:
        ArgumentError: the folder is of something else.
    """
    if not (folder / RECORD_NAME).exists():
        _require_own(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)
    for path in folder.glob(_FILES):
        path.unlink()
