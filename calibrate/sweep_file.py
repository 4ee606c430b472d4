"""What a sweep has measured so far, line by line in a file, so that one that was interrupted goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from ..runtime.calibrations import RowTime
from ..runtime.cli.pictures import unwritable
from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.manifest import Frozen

FORMAT = 1
_NAME = "sweep.jsonl"


class Ground(Frozen, frozen=True, kw_only=True, tag="ground"):
    """All that a sweep's figures rest on but plans, prompts and seeds, which stand in the lines of their pictures.

    bundle: `Manifest.files_digest`. facts: the sha256 of what else the manifest says, without the defaults that
        sweeps store.
    """

    format: int
    bundle: str
    facts: str
    target: str
    threads: int | None
    machine: tuple[str, ...]
    versions: Mapping[str, str]
    large: str
    small: str
    num_inference_steps: int
    scorer: str | None

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class RowTimes(Frozen, frozen=True, kw_only=True, tag="row_times"):
    """How long a row of each kind takes: see `row_kinds`."""

    by_kind: Mapping[str, RowTime]


class PictureQuality(Frozen, frozen=True, kw_only=True, tag="picture"):
    """One picture of a plan beside the large denoiser's of the same prompt and seed."""

    plan: str
    prompt: str
    seed: int
    latent_error: float
    psnr_db: float
    ssim: float
    right: bool | None


Line = Ground | RowTimes | PictureQuality


class SweepFile:
    """A sweep's file in a folder, which is made; a context manager that one process at a time enters.

    discard: begin anew, whatever is there.

    Raises, on entering:
        ArgumentError: the folder holds a sweep on another ground.
        CalibrationError: the file is damaged, or another process writes it.
        TandemError: it cannot be written.
    """

    def __init__(self, folder: Path, ground: Ground, *, discard: bool = False) -> None:
        self.path = folder / _NAME
        self.row_times: Mapping[str, RowTime] | None = None
        self.pictures: dict[tuple[str, str, int], PictureQuality] = {}
        self._ground, self._discard = ground, discard
        self._stream: BinaryIO | None = None

    def __enter__(self) -> SweepFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("r+b" if self.path.exists() else "w+b")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume(self._stream)
        except BlockingIOError as error:
            self._close()
            what, remedy = "another run is writing it", "Wait for its end, or give another --out."
            raise CalibrationError(str(self.path), what, remedy=remedy) from error
        except OSError as error:
            self._close()
            raise unwritable(self.path, error, "--out") from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def keep(self, lines: Iterable[RowTimes | PictureQuality]) -> None:
        """Write lines, and have them on the disk."""
        if self._stream is None:
            raise ValueError("the sweep's file is not open")
        kept = tuple(lines)
        self._stream.write(b"".join(msgspec.json.encode(line) + b"\n" for line in kept))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        for line in kept:
            self._take(line)

    def _resume(self, stream: BinaryIO) -> None:
        """Read what is there up to the last whole line, and be ready to write behind it."""
        whole = b"" if self._discard else stream.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        lines = [self._decoded(line) for line in whole.splitlines()]
        if lines and lines[0] != self._ground:
            what = f"holds a sweep of {self._difference(lines[0])}"
            remedy = "Give another --out, or --discard to start over."
            raise ArgumentError(str(self.path), what, remedy=remedy)
        for line in lines[1:]:
            self._take(line)
        stream.seek(len(whole))
        stream.truncate()
        if not lines:
            stream.write(msgspec.json.encode(self._ground) + b"\n")

    def _decoded(self, line: bytes) -> Line:
        try:
            decoded: Line = msgspec.json.decode(line, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            what, remedy = f"not a sweep's file ({error})", "Give another --out, or --discard to start over."
            raise CalibrationError(str(self.path), what, remedy=remedy) from error
        return decoded

    def _difference(self, other: Line) -> str:
        """What another sweep's first line says otherwise, in words."""
        if not isinstance(other, Ground):
            return "unknown settings"
        fields = Ground.__struct_fields__
        names = [name for name in fields if getattr(other, name) != getattr(self._ground, name)]
        return f"another {' and '.join(name.replace('_', ' ') for name in names)}"

    def _take(self, line: Line) -> None:
        if isinstance(line, RowTimes):
            self.row_times = line.by_kind
        elif isinstance(line, PictureQuality):
            self.pictures[line.plan, line.prompt, line.seed] = line

    def _close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what was kept is on the disk already
                self._stream.close()
            self._stream = None
