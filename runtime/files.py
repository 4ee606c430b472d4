"""Files that appear whole or not at all, and are known by their digests."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TOKEN_BYTES = 8
_PART = re.compile(rf"\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}\.part")
_MOST_S = 60.0  # no file here takes so long to be written
NO_LOCKS = frozenset({errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], *, replace: bool = True, within: Path | None = None
) -> None:
    """Let `write` fill a file beside `path`, and give it that name when it is complete and on the disk.

    The file's mode follows the umask. With `replace` off, a file that has the name by then stays as it is.
    A device or a pipe, such as /dev/null, is written to.

    within: another folder of the same file system to fill it in, such as one that is swept if this process is killed.

    Raises:
        FileExistsError: the name is taken and `replace` is off.
        OSError: the folder cannot be written or is full.
    """
    if replace and path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as stream:
            write(stream)
        return
    part = (within or path.parent) / f".{secrets.token_hex(_TOKEN_BYTES)}.part"
    try:
        with part.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            part.replace(path)
        else:
            _give_free_name(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sweep_parts(folder: Path) -> None:
    """Remove what `write_whole` began in a folder a minute ago or more: the process was killed. One folder deep.

    What cannot be removed stays.
    """
    with suppress(OSError):
        for part in folder.iterdir():
            if is_part(part.name) and time.time() - part.lstat().st_mtime > _MOST_S:
                part.unlink(missing_ok=True)


def is_part(name: str) -> bool:
    """Whether a file of this name is one that `write_whole` began."""
    return bool(_PART.fullmatch(name))


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk before those that are given next. Windows keeps them in order itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a folder against other processes that do. Whether it is held: without `wait` another may have it.

    Windows, which locks no folders, holds it always.

    Raises:
        OSError: the folder cannot be read, or locked, with one of NO_LOCKS where its file system knows no locks.
    """
    if os.name != "posix":
        yield True
        return
    import fcntl  # noqa: PLC0415 (Windows has none)

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _give_free_name(part: Path, path: Path) -> None:
    """Rename `part` to `path`, unless that is taken; where there are no links, an empty file takes the name first."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.open("xb").close()
        try:
            part.replace(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    else:
        part.unlink()
