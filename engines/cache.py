"""The cache of engines: a lock for each key, work beside the place, and one rename that publishes it whole.

    <engines>/<key>          a whole engine, and in `proof.json` when its files were last hashed
    <engines>/.<key>.lock    held (flock) by the one that builds it, and by its builder process
    <engines>/.<key>.part    what is being built; `.old`: a damaged engine on its way out

What a killed builder leaves is under names whose lock nobody holds: the next run sweeps it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ..runtime.cache import check_ownership, engines_folder
from ..runtime.engine_files import (
    LAYERS_NAME,
    PROOF_NAME,
    SIDECAR_NAME,
    Engine,
    Layer,
    check_engine_files,
    read_sidecar,
)
from ..runtime.errors import CacheError, CacheFullError, EngineError
from ..runtime.files import file_sha256
from ..runtime.manifest import FileRecord
from .job import Progress

POLL_S = 0.05
# File systems' clocks go in steps of up to 10 ms: two changes within one look like one.
_CLOCK_STEP_NS = 50_000_000
_LITTER = re.compile(r"\.([0-9a-f]{64})\.(lock|part|old)")
_ELSEWHERE = "give another folder with --cache or $TANDEMRT_CACHE."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


# (sha256 that is wanted, size, time of the last write, time of the last change of any kind, inode)
_Stamp = tuple[str, int, int, int, int]


class _Proof(msgspec.Struct, frozen=True):
    """What hashing the files of an engine said, and their stamps at that time."""

    whole: bool
    files: dict[str, _Stamp]


class Claim:
    """The right to build one key: `part` is the empty folder to build in, `lock` the descriptor of the held lock."""

    def __init__(self, engines: Path, key: str, lock: int) -> None:
        self._engines, self._key, self.lock = engines, key, lock
        self.part = engines / f".{key}.part"

    def publish(self, engine: Engine, layers: Sequence[Layer] = ()) -> Path:
        """Write the sidecar, flush everything to the disk and give the folder its name, in a damaged one's place.

        layers: of the compiled graph, for `inspect`.

        Raises:
            OSError: the file system is full or refuses.
        """
        place, old = self._engines / self._key, self._engines / f".{self._key}.old"
        for name, told in ((SIDECAR_NAME, engine), (LAYERS_NAME, tuple(layers))):
            (self.part / name).write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n")
        stamps = _stamps(self.part, engine)  # the engine's records were made of these very files
        if stamps is not None:
            _write_proof(self.part, _Proof(whole=True, files=stamps))
        for path in (*self.part.iterdir(), self.part):
            _sync(path)
        if os.path.lexists(place):
            place.rename(old)
        self.part.rename(place)
        _sync(self._engines)
        shutil.rmtree(old, ignore_errors=True)
        return place


@contextlib.contextmanager
def claimed(cache: Path, key: str, progress: Progress) -> Iterator[Claim]:
    """Wait for the right to build `key`, and give it back with everything that was not published.

    Raises:
        CacheError: the cache cannot be written.
        EngineError: the file system refuses a file that is not the cache's.
    """
    engines = engines_folder(cache)
    try:
        engines.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(engines)
        lock = _locked(engines, key, progress)
    except OSError as error:
        raise _unwritable(engines, error) from error
    claim = Claim(engines, key, lock)
    try:
        shutil.rmtree(claim.part, ignore_errors=True)
        try:
            claim.part.mkdir(mode=0o700)
            yield claim
        except OSError as error:
            raise _refused(engines, error) from error
    finally:
        _release(engines, key, lock, ("part",))


def cached(cache: Path, key: str) -> tuple[Path, Engine] | None:
    """The engine of `key` if it is there and whole; a damaged one counts as none, since it is built anew.

    Files are hashed once: what came of it is kept beside them and holds as long as none is touched. What is loaded is
    hashed each time nevertheless; see `check_engine_files`.

    Raises:
        UntrustedError: others could have written to the cache or the engine's folder, of which no pipeline runs any.
    """
    engines = engines_folder(cache)
    place = engines / key
    for folder in (engines, place):
        if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises where a folder above may not be entered)
            return None
        check_ownership(folder)
    try:
        engine = read_sidecar(place)
    except EngineError:
        return None
    return (place, engine) if _is_whole(place, engine) else None


def _is_whole(folder: Path, engine: Engine) -> bool:
    before = _stamps(folder, engine)
    known = _read_proof(folder)
    if known is not None and known.files == before:
        return known.whole
    try:
        check_engine_files(folder, engine)
        whole = True
    except EngineError:
        whole = False
    if before is not None and before == _stamps(folder, engine):
        with contextlib.suppress(OSError):  # in a cache that cannot be written they are hashed each time
            _write_proof(folder, _Proof(whole=whole, files=before))
    return whole


def _stamps(folder: Path, engine: Engine) -> dict[str, _Stamp] | None:
    """What tells that a file was not touched; None where one is missing, or so new that a change may not show."""
    stamps = {}
    for name, record in engine.files.items():
        try:
            status = (folder / name).lstat()
        except OSError:
            return None
        if abs(time.time_ns() - status.st_ctime_ns) < _CLOCK_STEP_NS:
            return None
        stamps[name] = (record.sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return stamps


def _read_proof(folder: Path) -> _Proof | None:
    try:
        return msgspec.json.decode((folder / PROOF_NAME).read_bytes(), type=_Proof)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write_proof(folder: Path, proof: _Proof) -> None:
    part = folder / f".{PROOF_NAME}.part"  # one that a killed process left is written over
    part.write_bytes(msgspec.json.encode(proof))
    part.replace(folder / PROOF_NAME)


def records_of(folder: Path, names: tuple[str, ...]) -> dict[str, FileRecord]:
    """Size and digest of files in a folder."""
    return {name: FileRecord(size=(folder / name).stat().st_size, sha256=file_sha256(folder / name)) for name in names}


def _refused(engines: Path, error: OSError) -> EngineError:
    """The error for a build that a file system refused: its ingredients lie outside the cache."""
    named = error.filename
    if error.errno in _FULL or not isinstance(named, str) or Path(named).is_relative_to(engines):
        return _unwritable(engines, error)
    return EngineError(named, f"cannot be used ({error.strerror or error})")


def _unwritable(folder: Path, error: OSError) -> CacheError:
    """The error for a cache whose file system refused; it says what to do about it."""
    full = error.errno in _FULL
    remedy = f"Free some space, or {_ELSEWHERE}" if full else f"G{_ELSEWHERE[1:]}"
    what = f"the cache cannot be written ({error.strerror or error})"
    kind = CacheFullError if full else CacheError
    return kind(str(error.filename or folder), what, remedy=remedy)


def too_full(folder: Path, needed_bytes: int) -> CacheFullError | None:
    """The error for a cache whose file system has not that much room; None where it has, or does not tell."""
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError:
        return None
    if free_bytes >= needed_bytes:
        return None
    what = (
        f"too little space: {free_bytes / 1e6:.1f} MB are free, and the build needs about {needed_bytes / 1e6:.1f} MB"
    )
    return CacheFullError(str(folder), what, remedy=f"Free some space, or {_ELSEWHERE}")


def _locked(engines: Path, key: str, progress: Progress) -> int:
    told = False
    while (lock := _try_lock(_lock_path(engines, key))) is None:
        if not told:
            progress(f"waiting for another process that builds {key[:12]}", 0, 1)
            told = True
        time.sleep(POLL_S)
    return lock


def _lock_path(engines: Path, key: str) -> Path:
    return engines / f".{key}.lock"


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another process does."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before may have removed the file between the two calls: then this is a lock of nothing.
        if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
    except OSError as error:
        if error.errno not in (*_HELD, errno.ENOENT):
            os.close(lock)
            raise
    os.close(lock)
    return None


def _sweep(engines: Path) -> None:
    """Remove what builders left that are gone."""
    keys = {found[1] for entry in engines.iterdir() if (found := _LITTER.fullmatch(entry.name))}
    for key in keys:
        lock = _try_lock(_lock_path(engines, key))
        if lock is not None:
            _release(engines, key, lock, ("part", "old"))


def _release(engines: Path, key: str, lock: int, kinds: Sequence[str]) -> None:
    """Remove what is left of a build, and let go of its lock, whatever cannot be removed: a later run sweeps it."""
    try:
        for kind in kinds:
            shutil.rmtree(engines / f".{key}.{kind}", ignore_errors=True)
        with contextlib.suppress(OSError):
            _lock_path(engines, key).unlink()
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
