"""What calibrations keep in the user's cache: where it lies, by all that it rests on, and how long it stays."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from ..runtime.cache import cache_folder

UNUSED_DAYS = 90
Kind = Literal["quantize", "ranges", "splits"]
_ENTRY = re.compile(r"[0-9a-f]{64}(\.npz)?")


def entry_of(cache: Path | None, kind: Kind, ground: Mapping[str, Any], suffix: str = "") -> Path:
    """Where what rests on `ground`, JSON-able, is kept: a folder, or with a suffix a file; see `cache_folder`."""
    digest = hashlib.sha256(json.dumps(ground, sort_keys=True).encode()).hexdigest()
    return cache_folder(cache) / kind / f"{digest}{suffix}"


def sweep_unused(cache: Path | None, *in_use: Path) -> None:
    """Remove the entries that nothing has used for 90 days; what cannot be removed stays.

    in_use: entries that count as used now, whether they are there yet or not. A folder whose ledger another process has
    is in use too.
    """
    for entry in in_use:
        with suppress(OSError):  # not there yet, or in a cache that is only read
            os.utime(entry)
    before = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in (cache_folder(cache) / kind for kind in get_args(Kind)):
        with suppress(OSError):
            for entry in folder.iterdir():
                if _ENTRY.fullmatch(entry.name):
                    with suppress(OSError):
                        _sweep(entry, before)


def _sweep(entry: Path, before: float) -> None:
    """Remove an entry that was last used before a time, in seconds; OSError where it is held, or cannot be removed."""
    if _last_used(entry) >= before:
        return
    if not entry.is_dir():
        entry.unlink()
        return
    with ExitStack() as held:
        for ledger in entry.glob("*.jsonl"):
            fcntl.flock(held.enter_context(ledger.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _last_used(entry) < before:  # by nobody meanwhile
            shutil.rmtree(entry)


def _last_used(entry: Path) -> float:
    within = entry.iterdir() if entry.is_dir() else ()
    times: list[float] = [path.stat().st_mtime for path in (entry, *within)]
    return max(times)
