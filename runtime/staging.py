"""A folder that appears whole or not at all: built beside its place, then put there in one step.

Temporary folders are locked (flock) while their maker lives, so that the next run can tell a killed run's leftovers
from another run's work.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import ExportError, TandemError
from .manifest_files import MANIFEST_NAME, MAX_MANIFEST_BYTES, SEAL_NAME, decode

_PART = ".tandemrt-part-"
_OLD = ".tandemrt-old-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_OFFERED = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP)
_HELD_OR_GONE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.ENOENT)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a folder is that `--force` replaces.

    name: in messages. marker: the file at its root that it is known by. listed: all files that are its own, by their
    paths within it, marker and all; raises TandemError where the marker cannot be read.
    """

    name: str
    marker: str
    listed: Callable[[Path], Iterable[str]]


def _files_of_bundle(folder: Path) -> Iterable[str]:
    with (folder / MANIFEST_NAME).open("rb") as stream:
        manifest = decode(stream.read(MAX_MANIFEST_BYTES + 1), str(folder / MANIFEST_NAME))
    return (*manifest.files, MANIFEST_NAME, SEAL_NAME)


BUNDLE = Kind("bundle", MANIFEST_NAME, _files_of_bundle)


class Staging:
    """A temporary folder beside `out`, removed on leaving unless `publish` put it in `out`'s place.

    Parents of `out` that had to be made go with it. kind: of what `force` lets it replace.

    Raises, on entering:
        ExportError: `out` exists and may not be replaced, or its parent cannot be written.
    """

    def __init__(self, out: Path, *, force: bool, kind: Kind = BUNDLE) -> None:
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 — resolve() would follow a link at `out`
        self._force, self._kind = force, kind
        self.folder = self.out
        self._lock = -1
        self._new_parents = [parent for parent in self.out.parents if not os.path.lexists(parent)]

    def __enter__(self) -> Staging:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            _restore(self.out)
            require_free(self.out, force=self._force, kind=self._kind)
            sweep(self.out.parent)
            self.folder, self._lock = _new_locked_folder(self.out)
        except OSError as error:
            raise writing_failed(self.out, error) from error
        finally:
            self._remove_empty_parents()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After an exchange the temporary name holds the old bundle; after a plain rename it is gone.
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._remove_empty_parents()

    def publish(self) -> None:
        """Flush everything to disk, then put the folder in `out`'s place; what was there is kept until that is done.

        Raises:
            ExportError: `out` came into being meanwhile, or the file system failed.
        """
        try:
            _sync(self.folder)
            require_free(self.out, force=self._force, kind=self._kind)
            if self.out.exists():
                _swap(self.folder, self.out)
            else:
                self.folder.rename(self.out)
            _sync_one(self.out.parent)
        except OSError as error:
            raise writing_failed(self.out, error) from error

    def _remove_empty_parents(self) -> None:
        for parent in self._new_parents:
            with contextlib.suppress(OSError):  # rmdir spares a folder that holds anything
                parent.rmdir()


def require_free(out: Path, *, force: bool, kind: Kind = BUNDLE) -> None:
    """Check that a folder of a kind may be put at `out`.

    Raises:
        ExportError: it lies inside a bundle, or exists, and either `force` is not given or it holds anything that is
            not of that kind, which is never replaced.
    """
    for folder in Path(os.path.realpath(out.parent), out.name).absolute().parents:
        if os.path.lexists(folder / MANIFEST_NAME):
            raise ExportError(
                str(out), f"lies inside the bundle {folder}, which it would break", remedy="Give another folder."
            )
    if not os.path.lexists(out):
        return
    if not force:
        remedy = f"Give another folder, or --force to replace a {kind.name}."
        raise ExportError(str(out), "exists already", remedy=remedy)
    if out.is_symlink() or not out.is_dir() or not ((out / kind.marker).is_file() or not any(out.iterdir())):
        raise ExportError(
            str(out),
            f"exists and is no {kind.name}, so --force does not replace it",
            expected=f"a folder with {kind.marker}",
            remedy="Give another folder.",
        )
    _require_only(out, kind)


def _require_only(folder: Path, kind: Kind) -> None:
    """Check that all that would go with a folder is what it lists as its own."""
    found = {path.relative_to(folder): path.is_dir() for path in folder.rglob("*")}
    if not found:
        return
    try:
        files = {Path(name) for name in kind.listed(folder)}
    except (TandemError, OSError) as error:
        raise ExportError(
            str(folder),
            f"--force cannot tell which of its files are a {kind.name}'s ({error})",
            remedy="Remove the folder by hand, or give another.",
        ) from error
    folders = {parent for file in files for parent in file.parents}
    foreign = sorted(path for path, is_folder in found.items() if path not in (folders if is_folder else files))
    if foreign:
        raise ExportError(
            str(folder / foreign[0]),
            f"is not of the {kind.name}, so --force does not remove it",
            remedy="Move it elsewhere, or give another folder.",
        )


def sweep(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose makers are gone."""
    for leftover in parent.glob(f".*{_PART}*"):
        with contextlib.suppress(OSError):  # another user's, or nothing that an export made
            lock = _try_lock(leftover)
            if lock is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def writing_failed(out: Path, error: OSError) -> ExportError:
    """The error for a file system that refused; it names the path and, when the disk is full, what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "Free space or give another folder." if full else "Give a folder that can be written."
    return ExportError(str(error.filename or out), f"cannot be written ({error.strerror or error})", remedy=remedy)


def _new_locked_folder(out: Path) -> tuple[Path, int]:
    while True:
        folder = out.with_name(f".{out.name}{_PART}{secrets.token_hex(4)}")
        folder.mkdir(mode=0o755)
        try:
            lock = _try_lock(folder)
        except OSError:
            folder.rmdir()
            raise
        # Between mkdir and flock another run may have taken the folder for a leftover and removed it.
        if lock is not None:
            if folder.exists():
                return folder, lock
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder for as long as the descriptor is open; None where another process holds it or it is gone."""
    lock = -1
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        if error.errno in _HELD_OR_GONE:
            return None
        raise
    return lock


def _swap(new: Path, out: Path) -> None:
    """Exchange two folders; where the file system cannot, move the old one aside and back again on failure."""
    if _exchange(new, out):
        return
    aside = out.with_name(f".{out.name}{_OLD}{secrets.token_hex(4)}")
    out.rename(aside)
    try:
        new.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _restore(out: Path) -> None:
    """Undo a swap that was killed half-way: an old bundle moved aside goes back, or goes away if a new one is there."""
    for aside in [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}{_OLD}")]:
        if os.path.lexists(out):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(out)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where the C library or the file system does not offer it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
