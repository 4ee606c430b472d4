"""What a long measurement has found so far, a line for each thing, so that one that was interrupted goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..runtime.errors import ArgumentError
from .collection import writing


class Ledger:
    """A file of JSON lines, the first of which says what all rests on; a context manager.

    ground: JSON-able facts; a file on another ground is refused. discard: begin anew, whatever is there.

    Raises, on entering:
        ArgumentError: the file is of something else, or rests on another ground.
        TandemError: it cannot be written.
    """

    def __init__(self, path: Path, ground: Mapping[str, Any], *, discard: bool = False) -> None:
        self._path, self._discard = path, discard
        self._ground: dict[str, Any] = json.loads(json.dumps(ground))  # as it is read again
        self._found: dict[str, Any] = {}
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Ledger:
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            there = b"" if self._discard or not self._path.exists() else self._path.read_bytes()
        whole = there[: there.rfind(b"\n") + 1]
        lines = self._decoded(whole)
        if lines:
            self._require_same(lines[0])
        self._found = {key: facts for line in lines[1:] for key, facts in line.items()}
        with writing(self._path):
            self._stream = self._path.open("r+b" if self._path.exists() else "w+b")
            self._stream.truncate(len(whole))
            self._stream.seek(len(whole))
        if not lines:
            self._write(self._ground)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Any:
        """What was found before; None where nothing was."""
        return self._found.get(key)

    def put(self, key: str, facts: Any) -> None:
        """Keep what was found, on the disk too."""
        self._write({key: facts})
        self._found[key] = facts

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._stream is None:
            raise ValueError("the ledger is not open")
        with writing(self._path):
            self._stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def _decoded(self, whole: bytes) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError) as error:
            raise self._refused(f"not what a measurement left ({error})") from error
        if not all(isinstance(line, dict) for line in lines):
            raise self._refused("not what a measurement left")
        return lines

    def _require_same(self, ground: Mapping[str, Any]) -> None:
        names = dict.fromkeys((*self._ground, *ground))
        other = [name for name in names if ground.get(name) != self._ground.get(name)]
        if other:
            told = ", ".join(
                f"{name} is {ground.get(name)!r:.60} there, {self._ground.get(name)!r:.60} here" for name in other
            )
            raise self._refused(f"holds another measurement: {told}")

    def _refused(self, what: str) -> ArgumentError:
        remedy = "Give the same arguments to go on, another --out, or --discard to start over."
        return ArgumentError(str(self._path), what, remedy=remedy)
