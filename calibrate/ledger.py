"""What a long run has found so far, a line for each thing, so that one that was interrupted goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from ..runtime.cli.pictures import unwritable
from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.files import sync_folder

_REMEDY = "Give another --out, or --discard to start over."


class Ledger:
    """A file of JSON lines, the first of which says what all rests on; a context manager, one process at a time.

    What was put is on the disk: no crash, full disk or second process loses it.

    ground: JSON-able facts; a file on another ground is refused. discard: begin anew, whatever is there.
    forget: is given the key of each thing that is discarded, before that is so. option: what says where the file lies.

    Raises, on entering:
        ArgumentError: the file rests on another ground.
        CalibrationError: the file is of something else, or another process has it, or its file system knows no locks.
        TandemError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        ground: Mapping[str, Any],
        *,
        discard: bool = False,
        forget: Callable[[str], None] = lambda key: None,
        option: str = "--out",
    ) -> None:
        self._path, self._discard, self._forget, self._option = path, discard, forget, option
        self._ground: dict[str, Any] = json.loads(json.dumps(ground))  # as it is read again
        self._found: dict[str, Any] = {}
        self._file: FileIO | None = None

    def __enter__(self) -> Ledger:
        try:
            self._file = self._held()
            with writing(self._path, self._option):
                self._resume(self._file)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[str]:
        """The keys of what was found, in the order it was put in."""
        return iter(self._found)

    def get(self, key: str) -> Any:
        """What was found, as JSON has it; None where nothing was."""
        return self._found.get(key)

    def put(self, key: str, facts: Any) -> None:
        """Keep what was found, JSON-able, on the disk too; what was found under this key before counts no longer.

        Raises:
            TandemError: it cannot be written; what was put before stays.
        """
        line = _encoded({key: facts})
        found = json.loads(line)
        if found != {key: self._found.get(key)}:
            self._write(line)
            self._found |= found

    def _held(self) -> FileIO:
        """The file, locked; a new one where it was removed before it was."""
        while True:
            with writing(self._path, self._option):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Made, but never cut: what it holds is another's until it is locked.
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            file = FileIO(descriptor, "a+")  # unbuffered: nothing is left to write
            try:
                self._lock(file)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                        return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = f"Wait for its end, or give another {self._option}."
            raise CalibrationError(str(self._path), "another run is writing it", remedy=remedy) from error
        except OSError as error:
            what = f"cannot be locked against other runs ({error.strerror or error})"
            remedy = f"Give another {self._option}, on a file system that knows locks."
            raise CalibrationError(str(self._path), what, remedy=remedy) from error

    def _resume(self, file: FileIO) -> None:
        """Take what is there up to the last whole line, and be ready to write behind it."""
        file.seek(0)
        there, first = file.readall(), _encoded(self._ground)
        if self._discard:
            for key in _keys(there):
                self._forget(key)
            there = b""
        whole = there[: there.rfind(b"\n") + 1]
        if not whole and not first.startswith(there):
            raise _foreign(self._path)
        self._found = _found(whole, self._path, self._ground)
        file.truncate(len(whole))
        if not whole:
            self._write(first)
            sync_folder(self._path.parent)

    def _write(self, line: bytes) -> None:
        if self._file is None:
            raise ValueError("the ledger is not open")
        before, rest = os.fstat(self._file.fileno()).st_size, memoryview(line)
        with writing(self._path, self._option):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(before)
                raise

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # all that was put is on the disk
                self._file.close()
            self._file = None


def found_on(path: Path, ground: Mapping[str, Any]) -> dict[str, Any]:
    """What a ledger would find on a ground, by key; it is only read.

    Raises:
        ArgumentError, CalibrationError: as `Ledger`, but for another process.
    """
    whole = _read(path)
    return _found(whole, path, json.loads(json.dumps(ground)))


def read_ledger(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The ground that a ledger rests on, and what was found by key; None where there is none, or nothing in it yet.

    Raises:
        CalibrationError: it cannot be read, or is of something else.
    """
    whole = _read(path)
    return _decoded(whole, path) if whole else None


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Raise TandemError, with what helps, where the system refuses to write; `option` says where to."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, option) from error


def _read(path: Path) -> bytes:
    """The whole lines of a ledger; none where there is none."""
    try:
        there = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise CalibrationError(str(path), what, remedy="Check the path.") from error
    return there[: there.rfind(b"\n") + 1]


def _found(whole: bytes, path: Path, ground: Mapping[str, Any]) -> dict[str, Any]:
    """What whole lines say, whose first has to be `ground`."""
    if not whole:
        return {}
    then, found = _decoded(whole, path)
    told = "; ".join(_differences(then, ground))
    if told:
        remedy = f"Give the same arguments to go on. {_REMEDY}"
        raise ArgumentError(str(path), f"holds another run: {told}", remedy=remedy)
    return found


def _keys(there: bytes) -> Iterator[str]:
    """The keys of what can be read of a ledger, damaged or not."""
    for line in there.splitlines()[1:]:
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            yield from found if isinstance(found, dict) else ()


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def _decoded(whole: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        ground, *lines = (json.loads(line) for line in whole.splitlines())
    except (ValueError, RecursionError) as error:
        raise _foreign(path, f" ({error})") from error
    if not all(isinstance(line, dict) for line in (ground, *lines)):
        raise _foreign(path)
    return ground, {key: facts for line in lines for key, facts in line.items()}


def _foreign(path: Path, why: str = "") -> CalibrationError:
    return CalibrationError(str(path), f"not what a run left{why}", remedy=_REMEDY)


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs in two grounds, in words; of a mapping its keys that do, of a list the first that does."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*now, *then)):
            yield from _differences(then.get(key), now.get(key), f"{name} {key}".lstrip())
    elif isinstance(then, list) and isinstance(now, list) and len(then) != len(now):
        yield f"{name} are {len(then)} there, {len(now)} here"
    elif isinstance(then, list) and isinstance(now, list):
        first = next((pair for pair in enumerate(zip(then, now, strict=True), 1) if pair[1][0] != pair[1][1]), None)
        if first is not None:
            yield from _differences(*first[1], f"{name}, number {first[0]},")
    elif then != now:
        yield f"{name} is {then!r:.80} there, {now!r:.80} here"
