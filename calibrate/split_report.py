"""The files that a sweep leaves: its figures, and charts of what each plan costs and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.files import write_whole
from .quality import MAX_PSNR_DB
from .split_plans import pareto_front
from .svg import COLORS, Axis, Chart, Marker, side_by_side

REPORT, PLOT = "split.json", "split.svg"
_WIDTH = 480
_BEST = "#c0392b"
_MARKERS: Mapping[str, Marker] = {
    "large first": Marker(COLORS[0], "circle"),
    "small first": Marker(COLORS[1], "square"),
    "interleaved": Marker(COLORS[2], "triangle"),
    "given": Marker(COLORS[3], "diamond"),
}
# Of marks with intervals, which would hide each other at the same cost.
_ASIDE = {"small first": -0.024, "interleaved": 0.024}
# Of each quality what its axis says, and whether more of it is better.
_AXES = {
    "latent_error": ("latent error to the large denoiser alone", False),
    "psnr_db": ("PSNR to the large denoiser alone, dB", True),
    "ssim": ("SSIM to the large denoiser alone", True),
    "accuracy": ("share of right pictures, 95% interval", True),
}


def write_report(folder: Path, result: Mapping[str, Any]) -> None:
    """Write what `tandemrt calibrate split --json` tells, as JSON and as SVG; each file appears whole or not at all.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    texts = {REPORT: json.dumps(result, indent=2) + "\n", PLOT: drawn(result)}
    for name, text in texts.items():
        write_whole(folder / name, lambda stream, text=text: stream.write(text.encode()))  # type: ignore[misc]


def drawn(result: Mapping[str, Any]) -> str:
    """The plans as SVG, in one chart by the quality that decides and in one by another, where that tells plans apart.

    PSNR tells nothing where all plans are the large denoiser itself; its latent error of 0 can always be drawn.
    """
    measures = list(dict.fromkeys((result["chosen_by"], "latent_error", "psnr_db")))[:2]
    what = f"{result['large']} and {result['small']}, {result['num_inference_steps']} steps"
    how = f"{result['prompts']} prompts, {result['target']}"
    marked = {measure: marks for measure in measures if (marks := _marks(result, measure))}
    titles = (what, how) if len(marked) > 1 else (f"{what}, {how}",)
    charts = zip(marked.items(), titles, strict=True)
    return side_by_side([_chart(result, measure, marks, title) for (measure, marks), title in charts])


@dataclass(frozen=True, slots=True)
class _Mark:
    """A plan in a chart, with the ends of its interval where there is one. cost: where it is drawn, perhaps aside."""

    cost: float
    value: float
    low: float
    high: float
    point: Mapping[str, Any]


def _marks(result: Mapping[str, Any], measure: str) -> list[_Mark]:
    """The plans within a chart; equal pictures' PSNR is beyond it."""
    return [mark for mark in (_mark(point, measure) for point in result["points"]) if mark.value < MAX_PSNR_DB]


def _chart(result: Mapping[str, Any], measure: str, marks: Sequence[_Mark], title: str) -> Chart:
    label, rises = _AXES[measure]
    ends = [end for mark in marks for end in (mark.low, mark.high)]
    costs = Axis("cost, share of the large denoiser alone", 0, 1.12 * max(mark.cost for mark in marks))
    chart = Chart(title, costs, Axis.around(label, ends), width=_WIDTH)
    if result["budget"] is not None and result["budget"] <= costs.high:
        chart.line([(result["budget"], end) for end in chart.y_ends], _BEST, width=1, dashed=True)
    front = pareto_front([(mark.point["cost"], mark.value if rises else -mark.value) for mark in marks])
    line = sorted((mark.cost, mark.value) for mark, on in zip(marks, front, strict=True) if on)
    chart.line(line, "#1c1e22", width=1.2, dashed=True)
    for mark, on in zip(marks, front, strict=True):
        _draw(chart, mark, measure, _label(mark.point["steps"], result["large"]) if on or mark.point["best"] else "")
    for order in dict.fromkeys(point["order"] for point in result["points"]):
        chart.legend(order, _MARKERS[order])
    return chart


def _mark(point: Mapping[str, Any], measure: str) -> _Mark:
    if measure != "accuracy":
        return _Mark(point["cost"], point[measure], point[measure], point[measure], point)
    value, low, high = (point["accuracy"][name] for name in ("share", "low", "high"))
    return _Mark(point["cost"] + _ASIDE.get(point["order"], 0), value, low, high, point)


def _draw(chart: Chart, mark: _Mark, measure: str, label: str) -> None:
    marker, at = _MARKERS[mark.point["order"]], (mark.cost, mark.value)
    if mark.low < mark.high:
        chart.line([(mark.cost, mark.low), (mark.cost, mark.high)], marker.color, width=1, opacity=0.4)
    if mark.point["best"]:
        chart.mark(at, Marker(_BEST, "circle", radius=9, filled=False))
    told = f"{mark.point['plan']}: cost {mark.point['cost']:.3f}, {measure} {mark.value:.4g}"
    chart.mark(at, marker, told, label=label)


def _label(steps: list[tuple[str, int]], large: str) -> str:
    """A plan in few letters: the denoiser that is alone, or how many steps the large one has."""
    if len(steps) == 1:
        return steps[0][0]
    return f"{sum(count for name, count in steps if name == large)} {large}"
