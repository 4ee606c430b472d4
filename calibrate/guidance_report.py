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
from .svg import COLORS, Axis, Chart, Marker, Shape

FIGURES, CURVES, CURVES_PLOT, FRONT_PLOT = "guidance.json", "curves.json", "curves.svg", "front.svg"

_KINDS: Sequence[tuple[str, Shape]] = tuple(zip(COLORS, ("circle", "square", "triangle"), strict=False))


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
    """What the settings of each kind cost and how near their pictures are; those on the front are filled and joined.

    Dashed: the PSNR that was asked for.
    """
    whole = {
        kind: [one for one in found["settings"] if one.get("prompts", 0) == one.get("of")]
        for kind, found in facts["kinds"].items()
    }
    asked = facts["loss"]["min_psnr_db"]
    decibels = [one["psnr_db"] for ones in whole.values() for one in ones]
    decibels += [] if asked is None else [asked]
    costs = Axis("runs of a branch, of those with full guidance", 0.45, 1.05)
    title = "What is left of the branches' runs, and what it costs; filled: the front"
    chart = Chart(title, costs, Axis.around("PSNR to full guidance, dB", decibels or [0.0]))
    if asked is not None:
        chart.line([(costs.low, asked), (costs.high, asked)], "#1c1e22", width=1, dashed=True)
    for (kind, ones), (color, shape) in zip(whole.items(), _KINDS, strict=False):
        chart.legend(kind, Marker(color, shape))
        at = [(one["branches"] / facts["full_branches"], one["psnr_db"]) for one in ones]
        chart.line([point for point, one in zip(at, ones, strict=True) if one["front"]], color)
        for point, one in zip(at, ones, strict=True):
            told = ", ".join(f"{name} {value:g}" for name, value in one["numbers"].items())
            chart.mark(point, Marker(color, shape, filled=one["front"]), f"{kind}: {told}")
    return chart
