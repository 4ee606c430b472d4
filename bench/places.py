"""Places of this machine by what a report calls them: their paths say nothing on another one, and are nobody's."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import msgspec

from .reports.schema import Report

# What cannot stand right before a path that is a whole one, and right after a folder's.
_BEFORE, _AFTER = r"(?<![\w.~-])", r"(?![\w-]|\.\w)"


def places_of(named: Mapping[str, Path | None]) -> dict[str, str]:
    """Names by path, of these and of what every machine has, such as a home."""
    own = {"HOME": Path(os.environ.get("HOME", "/")), "TMP": Path(gettempdir()), "TANDEMRT": Path(__file__).parents[1]}
    if sys.prefix != sys.base_prefix:
        own["PYTHON"] = Path(sys.prefix)
    every = {**own, **named}
    found = {each: name for name, path in every.items() if path is not None for each in (path.resolve(), path)}
    return {str(path): name for path, name in found.items() if path.is_absolute() and path != Path(path.anchor)}


def without_places(report: Report, places: Mapping[str, str]) -> Report:
    """A report that tells of these places by their names; of a place within another by its own."""
    ordered = sorted(places, key=len, reverse=True)
    pattern = re.compile(f"{_BEFORE}(?:{'|'.join(map(re.escape, ordered))}){_AFTER}")

    def told(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: places[found[0]], value)
        if isinstance(value, Mapping):
            return {key: told(each) for key, each in value.items()}
        return [told(each) for each in value] if isinstance(value, (list, tuple)) else value

    return msgspec.convert(told(msgspec.to_builtins(report)), Report)
