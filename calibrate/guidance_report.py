"""The files that a calibration of guidance leaves: figures, curves, and a plot of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..runtime.files import write_whole
from .curves import Curve
from .svg import COLORS, Axis, Chart, Marker

FIGURES, CURVES, CURVES_PLOT, FRONT_PLOT = "guidance.json", "curves.json", "curves.svg", "front.svg"


def write_report(folder: Path, facts: Mapping[str, Any], curves: Sequence[Curve]) -> None:
    """Write figures and curves as JSON and as SVG; each file appears whole or not at all.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    texts = {
        FIGURES: json.dumps(facts, indent=2, allow_nan=False) + "\n",
        CURVES: json.dumps([msgspec.to_builtins(curve) for curve in curves], allow_nan=False) + "\n",
        CURVES_PLOT: str(curves_chart(curves)),
        FRONT_PLOT: str(front_chart(facts)),
    }
    for name, text in texts.items():
        write_whole(folder / name, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]


def curves_chart(curves: Sequence[Curve]) -> Chart:
    """Every prompt's discrepancy by row, and the median of all."""
    values = np.array([curve.discrepancy for curve in curves])
    chart = Chart(
        f"How far guidance's branches are apart, {len(curves)} prompts",
        Axis("row", 0, max(values.shape[1] - 1, 1)),
        Axis("relative mean absolute error", 0, float(values.max()) * 1.05 or 1.0),
    )
    for curve in values:
        chart.line(list(enumerate(curve.tolist())), COLORS[0], width=1, opacity=0.25)
    chart.line(list(enumerate(np.median(values, axis=0).tolist())), COLORS[1], width=3)
    chart.legend("a prompt", Marker(COLORS[0]))
    chart.legend("the median", Marker(COLORS[1]))
    return chart


def front_chart(facts: Mapping[str, Any]) -> Chart:
    """What the settings of each kind cost and how near their pictures are; those on the front are filled and joined."""
    whole = {
        kind: [one for one in found["settings"] if one.get("prompts", 0) == one.get("of")]
        for kind, found in facts["kinds"].items()
    }
    every = [one for ones in whole.values() for one in ones]
    decibels = [one["psnr_db"] for one in every] or [0.0]
    chart = Chart(
        "What is left of the branches' runs, and what it costs",
        Axis("runs of a branch, of those with full guidance", 0.45, 1.05),
        Axis.around("PSNR to full guidance, dB", decibels),
    )
    for (kind, ones), color in zip(whole.items(), COLORS, strict=False):
        chart.legend(kind, Marker(color))
        at = {index: (one["branches"] / facts["full_branches"], one["psnr_db"]) for index, one in enumerate(ones)}
        chart.line([at[index] for index, one in enumerate(ones) if one["front"]], color)
        for index, one in enumerate(ones):
            told = ", ".join(f"{name} {value:g}" for name, value in one["numbers"].items())
            chart.mark(at[index], Marker(color, filled=one["front"]), f"{kind}: {told}")
    return chart
