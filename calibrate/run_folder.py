"""A folder that a long run fills file by file, so that one that was interrupted goes on."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError
from ..runtime.files import file_sha256, sweep_parts, write_whole
from .ledger import Ledger, found_on, writing


class RunFolder:
    """A folder with a ledger of its files; a context manager that one process at a time enters.

    A file's line, with its size and digest, is written before the file, so that every file of the run is known for
    one, whenever it was interrupted. Which files need not be made again is decided by digest.

    ledger: the ledger's name. names: a pattern that the names of the run's files match in full, and of no other's.
    ground: see `Ledger`. discard: begin anew; the files of the run that is there are removed, and no others.

    Raises, on entering:
        ArgumentError: another run is there, or other files and no run.
        CalibrationError: the ledger is damaged, or another process has it.
        TandemError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, ledger: str, names: str, ground: Mapping[str, Any], *, discard: bool = False
    ) -> None:
        self.path = folder
        self._record, self._names, self._ground, self._discard = folder / ledger, re.compile(names), ground, discard
        self._ledger = Ledger(self._record, ground, discard=discard, forget=self._forget)

    def __enter__(self) -> RunFolder:
        self._require_own()
        self._ledger.__enter__()
        sweep_parts(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ledger.__exit__(kind, error, traceback)

    def there(self) -> dict[str, Any]:
        """What a run would find by name, of files that are there and whole; nothing is made, nor is it entered.

        Raises:
            ArgumentError, CalibrationError: as on entering, but for another process.
        """
        self._require_own()
        found = {} if self._discard else found_on(self._record, self._ground)
        return {name: facts for name, facts in found.items() if _is_whole(self.path / name, facts)}

    @property
    def found(self) -> dict[str, Any]:
        """What the lines say, by name."""
        return {name: self._ledger.get(name) for name in self._ledger}

    def missing(self, names: Sequence[str], what: str, reporter: Reporter) -> list[int]:
        """The indices of the names whose files are to be made, which is told of those that are damaged.

        Raises:
            ArgumentError: a file of that name is there, and is not the run's.
        """
        missing = []
        for index, name in enumerate(names):
            facts, path = self._ledger.get(name), self.path / name
            if facts is None and path.exists():
                raise ArgumentError(
                    str(path), "is there, and not of this run", remedy="Move it, or give another --out."
                )
            if facts is None or not _is_whole(path, facts):
                missing.append(index)
                if facts is not None:
                    reporter.warn(f"{path}: missing or damaged, it is made again")
        if len(missing) < len(names):
            reporter.note(f"goes on with {len(names) - len(missing)} of {len(names)} {what} there")
        return missing

    def add(self, name: str, content: bytes, facts: Mapping[str, Any]) -> None:
        """Keep a file whole, and facts about it beside its size and digest; raises TandemError."""
        digest = hashlib.sha256(content).hexdigest()
        self._ledger.put(name, {"size": len(content), "sha256": digest, **facts})
        with writing(self.path / name):
            write_whole(self.path / name, operator.methodcaller("write", content))

    def _forget(self, name: str) -> None:
        if self._names.fullmatch(name):
            (self.path / name).unlink(missing_ok=True)

    def _require_own(self) -> None:
        """Raise ArgumentError where the folder holds files and no ledger."""
        if self.path.is_dir() and not self._record.exists():
            other = next((path.name for path in sorted(self.path.iterdir()) if not path.name.startswith(".")), None)
            if other is not None:
                what = f"holds other files and no {self._record.name}"
                raise ArgumentError(
                    str(self.path), what, got=other, expected="a new folder", remedy="Give another --out."
                )


def _is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file is there and what its line says."""
    try:
        return (path.stat().st_size, file_sha256(path)) == (facts["size"], facts["sha256"])
    except (OSError, LookupError, TypeError):
        return False
