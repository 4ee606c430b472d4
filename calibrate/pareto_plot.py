"""A sweep's plans as a picture: what each costs and how good it is, with a line through those that no other beats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from .quality import MAX_PSNR_DB
from .split_plans import pareto_front

WIDTH, HEIGHT = 460, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 34, 74
TICKS = 6
# Of marks with intervals, which would hide each other at the same cost.
ASIDE = {"small first": -5, "interleaved": 5}
STYLE = (
    "text{font:11px sans-serif;fill:#1c1e22}.quiet{fill:#70747c}.title{font-size:13px}.grid{stroke:#e4e6ea}"
    ".front{fill:none;stroke:#1c1e22;stroke-width:1.2;stroke-dasharray:4 3}.budget{stroke:#c0392b;stroke-dasharray:2 3}"
)
COLOURS = {"large first": "#2f7ed8", "small first": "#e0693a", "interleaved": "#3a9d6a", "given": "#8f6ac8"}
# Of each quality what its axis says, and whether more of it is better.
AXES = {
    "latent_error": ("latent error to the large denoiser alone", False),
    "psnr_db": ("PSNR to the large denoiser alone, dB", True),
    "ssim": ("SSIM to the large denoiser alone", True),
    "accuracy": ("share of pictures that show their prompt, 95% interval", True),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A plan in a panel, with the ends of its interval where there is one."""

    cost: float
    value: float
    low: float
    high: float
    order: str
    label: str
    told: str
    best: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """Where numbers lie in a panel: `x` and `y` are the ends of its axes."""

    left: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, cost: float, value: float) -> tuple[float, float]:
        across = (cost - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def drawn(result: Mapping[str, Any]) -> str:
    """The picture, as SVG, of what `tandemrt calibrate split --json` tells: one panel by the quality that decides and
    one by another."""
    by = list(dict.fromkeys((result["chosen_by"], "latent_error", "psnr_db")))[:2]
    panels = "".join(part for index, measure in enumerate(by) for part in _panel(result, measure, index * WIDTH))
    width = len(by) * WIDTH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}">'
        f'<style>{STYLE}</style><rect width="{width}" height="{HEIGHT}" fill="#fcfbf8"/>'
        f"{panels}{''.join(_legend(result))}</svg>\n"
    )


def _panel(result: Mapping[str, Any], measure: str, left: float) -> Iterator[str]:
    title, rises = AXES[measure]
    marks = [mark for mark in (_mark(point, measure) for point in result["points"]) if mark.value < MAX_PSNR_DB]
    costs = [mark.cost for mark in marks]
    panel = Panel(left, _ends([0, *costs]), _ends([end for mark in marks for end in (mark.low, mark.high)]))
    yield f'<text x="{left + LEFT}" y="20" class="title">{escape(title)}</text>'
    yield from _grid(panel)
    if result["budget"] is not None and result["budget"] <= panel.x[1]:
        x, top = panel.at(result["budget"], panel.y[1])
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{HEIGHT - BOTTOM}" class="budget"/>'
    front = pareto_front([(mark.cost, mark.value if rises else -mark.value) for mark in marks])
    line = sorted(panel.at(mark.cost, mark.value) for mark, on in zip(marks, front, strict=True) if on)
    yield f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}" class="front"/>'
    for mark, on in zip(marks, front, strict=True):
        yield from _drawn_mark(panel, mark, labelled=on or mark.best)


def _mark(point: Mapping[str, Any], measure: str) -> Mark:
    if measure == "accuracy":
        value, low, high = (point["accuracy"][name] for name in ("share", "low", "high"))
    else:
        value = low = high = point[measure]
    counts = [count for _, count in point["steps"]]
    first = point["steps"][0][0]
    own = sum(count for name, count in point["steps"] if name == first)
    label = "/".join(map(str, counts)) if len(counts) <= 3 else f"{own} of {sum(counts)}"
    if len(counts) == 1:
        label = first
    told = f"{point['plan']}: cost {point['cost']:.3f}, {measure} {value:.4g}"
    return Mark(point["cost"], value, low, high, point["order"], label, told, point["best"])


def _drawn_mark(panel: Panel, mark: Mark, *, labelled: bool) -> Iterator[str]:
    x, y = panel.at(mark.cost, mark.value)
    colour = COLOURS[mark.order]
    if mark.low < mark.high:
        x += ASIDE.get(mark.order, 0)
        (_, low), (_, high) = panel.at(mark.cost, mark.low), panel.at(mark.cost, mark.high)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-opacity="0.4"/>'
    if mark.best:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="#c0392b" stroke-width="1.5"/>'
    yield _shape(mark.order, x, y, f'fill="{colour}"', f"<title>{escape(mark.told)}</title>")
    if labelled:
        room = 6.5 * len(mark.label) + 8 < panel.left + WIDTH - x
        place = f'x="{x + 8:.1f}"' if room else f'x="{x + 6:.1f}" text-anchor="end"'
        yield f'<text {place} y="{y - 9:.1f}">{escape(mark.label)}</text>'


def _shape(order: str, x: float, y: float, style: str, inside: str = "") -> str:
    """A circle, square, triangle or diamond, so that orders are told apart without colours too."""
    if order == "large first":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}>{inside}</circle>'
    corners = {
        "small first": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "interleaved": ((0, -6), (5.5, 4.5), (-5.5, 4.5)),
    }.get(order, ((0, -6.5), (5, 0), (0, 6.5), (-5, 0)))
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" {style}>{inside}</polygon>'


def _grid(panel: Panel) -> Iterator[str]:
    """Lines at round numbers, which the axes have."""
    bottom, right = HEIGHT - BOTTOM, panel.left + WIDTH - RIGHT
    for value in _round_numbers(*panel.x):
        x, _ = panel.at(value, panel.y[0])
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" class="quiet">{value:g}</text>'
    for value in _round_numbers(*panel.y):
        _, y = panel.at(panel.x[0], value)
        yield f'<line x1="{panel.left + LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        yield f'<text x="{panel.left + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" class="quiet">{value:g}</text>'
    yield f'<text x="{right}" y="{bottom + 32}" text-anchor="end" class="quiet">cost, share of the large alone</text>'


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Round ends of an axis around values, a little beyond them."""
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.06
    step = _step(low, high + margin)
    first = 0.0 if low >= 0 and low < 2 * step else low - margin
    return first, high + margin


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten that cuts low to high in at most TICKS parts."""
    steps = (factor * 10.0**power for power in range(-9, 10) for factor in (1, 2, 5))
    return next(step for step in steps if (high - low) / step <= TICKS)


def _round_numbers(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = -int(-low // step)
    return [index * step for index in range(first, int(high // step) + 1)]


def _legend(result: Mapping[str, Any]) -> Iterator[str]:
    """What the marks mean, and what was measured."""
    x, y = float(LEFT), HEIGHT - 26.0
    for order in dict.fromkeys(point["order"] for point in result["points"]):
        yield _shape(order, x, y - 4, f'fill="{COLOURS[order]}"')
        yield f'<text x="{x + 10:.1f}" y="{y:.1f}">{order}</text>'
        x += 96
    yield f'<text x="{x:.1f}" y="{y:.1f}" class="quiet">dashed: no other plan is cheaper and better</text>'
    told = (
        f"{result['large']} and {result['small']}, {result['num_inference_steps']} steps, {result['prompts']} prompts, "
        f"on {result['target']}"
    )
    yield f'<text x="{LEFT}" y="{HEIGHT - 8}" class="quiet">{escape(told)}</text>'
