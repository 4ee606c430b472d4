"""How figures are summed up: medians with their spread, Markdown tables, files that appear whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.runtime.files import write_whole


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """The median of `samples` with what surrounds it: extremes, 10th and 90th percentile, and how many there are."""
    low, tenth, median, ninetieth, high = (float(value) for value in np.percentile(samples, (0, 10, 50, 90, 100)))
    return {"median": median, "p10": tenth, "p90": ninetieth, "minimum": low, "maximum": high, "count": len(samples)}


def cell(figures: Mapping[str, float], digits: int) -> str:
    """A `spread` in a table: its median, in brackets the 10th to 90th percentile."""
    return f"{figures['median']:,.{digits}f} ({figures['p10']:,.{digits}f}–{figures['p90']:,.{digits}f})"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: Set[int] = frozenset()) -> str:
    """A Markdown table; the first column and those of `words`, counted from 0, are aligned left, the others right."""
    lines = [heads, ["---" if at == 0 or at in words else "---:" for at in range(len(heads))], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_text(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all; its folder is made.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda stream: stream.write(text.encode("utf-8")))


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write `facts` as indented JSON; NaN and infinities, which JSON has no words for, raise ValueError."""
    write_text(path, json.dumps(facts, indent=2, allow_nan=False) + "\n")


def write_report(path: Path, facts: dict[str, Any], text: str) -> None:
    """Write `facts` to `path` and `text` as Markdown beside it, and print the text.

    Raises:
        ValueError, OSError: as `write_json` and `write_text`.
    """
    write_json(path, facts)
    text = text.rstrip("\n") + "\n"
    write_text(path.with_suffix(".md"), text)
    print(text, end="")
