"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], *, replace: bool = True, within: Path | None = None
) -> None:
    """Let `write` fill a file beside `path`, and give it that name when it is complete and on the disk.

    The file's mode follows the umask. With `replace` off, a file that has the name by then stays as it is.

    within: another folder of the same file system to fill it in, such as one that is swept if this process is killed.

    Raises:
        FileExistsError: the name is taken and `replace` is off.
        OSError: the folder cannot be written or is full.
    """
    part = (within or path.parent) / f".{secrets.token_hex(8)}.part"
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
