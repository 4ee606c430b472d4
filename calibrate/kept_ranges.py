"""What was seen of a graph's values, kept in a file: a long calibration that was interrupted goes on behind it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np

from ..runtime.cli.pictures import unwritable
from ..runtime.files import sweep_parts, write_whole
from .observers import BINS, Histogram
from .ranges import Range, Ranges

_FACTS = "facts"


def kept_ranges(path: Path, collect: Callable[[], Ranges]) -> Ranges:
    """The ranges in a file, whose name says all that they rest on; collected, and put there, where it holds none.

    A file that is damaged is replaced.

    Raises:
        TandemError: as `collect`, or the file cannot be written.
    """
    there = _read(path)
    if there is not None:
        return there
    found = collect()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_parts(path.parent)
        write_whole(path, lambda stream: _write(stream, found))
    except OSError as error:
        raise unwritable(path, error, "--cache") from error
    return found


def _write(stream: BinaryIO, ranges: Ranges) -> None:
    values = [
        {"name": name, "width": one.histogram.width, "largest": one.histogram.largest}
        for name, one in ranges.values.items()
    ]
    arrays: dict[str, Any] = {_FACTS: np.array(json.dumps({"samples": ranges.samples, "values": values}))}
    for index, one in enumerate(ranges.values.values()):
        arrays[f"{index}/counts"] = one.histogram.counts
        if one.channels is not None:
            arrays[f"{index}/channels"] = one.channels
    np.savez_compressed(stream, **arrays)


def _read(path: Path) -> Ranges | None:
    """The ranges in a file; None where there is none, or a damaged one: a checksum stands beside every array."""
    try:
        with ZipFile(path) as whole:
            if whole.testzip() is not None:
                return None
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays[_FACTS]))
            values = {}
            for index, one in enumerate(facts["values"]):
                counts, channels = arrays[f"{index}/counts"], arrays.get(f"{index}/channels")
                if counts.shape != (BINS,):
                    return None
                histogram = Histogram(counts, float(one["width"]), float(one["largest"]))
                values[str(one["name"])] = Range(histogram, channels)
            return Ranges(int(facts["samples"]), values)
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, BadZipFile, zlib.error):
        return None
