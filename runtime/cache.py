"""The user's cache: where it lies, and that it is the user's own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import ArgumentError, EngineError, UntrustedError


def cache_folder(given: str | Path | None = None) -> Path:
    """The cache: `given`, else `$TANDEMRT_CACHE`, else the default one."""
    own = given if given is not None else os.environ.get("TANDEMRT_CACHE")
    return Path(own) if own else default_cache()


def require_folder(given: str | Path | None) -> None:
    """Raise ArgumentError where a cache is given to run on that is no folder: a mistyped one would go unnoticed.

    One that `$TANDEMRT_CACHE` names, and the default one, may be made later.
    """
    if given and not Path(given).is_dir():
        remedy = "`tandemrt build-engine --cache DIR` makes one; leave it out for the default cache."
        raise ArgumentError("cache", "not a folder that is there", got=str(given), remedy=remedy)


def default_cache() -> Path:
    """Where the cache lies when nothing else is said: `$XDG_CACHE_HOME/tandemrt`, else `~/.cache/tandemrt`."""
    general = os.environ.get("XDG_CACHE_HOME")
    return Path(general) / "tandemrt" if general else Path.home() / ".cache" / "tandemrt"


def engines_folder(cache: Path) -> Path:
    """Where in a cache the engines lie."""
    return cache / "engines"


def check_ownership(folder: Path) -> None:
    """Engines are native code: a folder that others could have put them into is not read.

    The user's own primary group is let write: it is often the user's alone, with a umask of 002 for it.

    Raises:
        UntrustedError: it belongs to another user, or others may write to it.
        EngineError: it is no folder, or cannot be looked at.
    """
    try:
        status = folder.stat()
    except OSError as error:
        raise EngineError(
            str(folder), f"cannot be read ({error.strerror or error})", remedy="Check the path."
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise EngineError(str(folder), "not a folder", remedy="Give another cache.")
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        what = "belongs to another user, and engines are code that would run as you"
        remedy = "Give a cache of your own, in $TANDEMRT_CACHE or with --cache where a command takes it."
        raise UntrustedError(str(folder), what, remedy=remedy)
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()
    if by_group or status.st_mode & stat.S_IWOTH:
        whom, change = ("everybody", "o-w") if status.st_mode & stat.S_IWOTH else ("a group that is not yours", "g-w")
        what = f"can be written by {whom}, and engines are code that would run as you"
        raise UntrustedError(str(folder), what, remedy=f"Check what is in it, then `chmod {change} {folder}`.")
