"""Charts of lines and marks between two axes, as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

Shape = Literal["circle", "square", "triangle", "diamond"]
Point = tuple[float, float]
_Box = tuple[float, float, float, float]  # left, top, right, bottom
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart with any colour vision
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 442, 64, 20, 40, 78
_LETTER = 6.5
_MARK, _LINE = 10.0, 1.0  # what it counts where a label meets one
_DASHED = ' stroke-dasharray="4 3"'
_CORNERS = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1.3), (1.2, 1), (-1.2, 1)),
    "diamond": ((0, -1.4), (1.1, 0), (0, 1.4), (-1.1, 0)),
}


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, from `low` to `high`, which differ."""

    label: str
    low: float
    high: float

    @classmethod
    def around(cls, label: str, values: Sequence[float]) -> Axis:
        """An axis with room around these values, of which there is one at least."""
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.5
        return cls(label, low - room, high + room)

    def ticks(self) -> Iterator[float]:
        """Round numbers within, three to nine."""
        raw = (self.high - self.low) / 8
        unit = 10 ** math.floor(math.log10(raw))
        step = next(size * unit for size in (1, 2, 5, 10) if size * unit >= raw)
        for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield index * step


@dataclass(frozen=True, slots=True)
class Marker:
    """How a point is drawn; shapes are told apart without colours too."""

    color: str
    shape: Shape = "circle"
    radius: float = 4.0
    filled: bool = True


class Chart:
    """Shapes in the axes' own units; `str` of it is the SVG, of so many units of width."""

    def __init__(self, title: str, x: Axis, y: Axis, *, width: int = _WIDTH) -> None:
        self.width = width
        self._title, self._x, self._y = title, x, y
        self._shapes: list[str] = []
        self._labels: list[tuple[Point, str]] = []
        self._taken: list[tuple[_Box, float]] = []
        self._legend: list[tuple[str, Marker]] = []

    @property
    def y_ends(self) -> tuple[float, float]:
        """The ends of the vertical axis."""
        return self._y.low, self._y.high

    def line(
        self, points: Sequence[Point], color: str, *, width: float = 2.0, opacity: float = 1.0, dashed: bool = False
    ) -> None:
        """Straight lines from point to point."""
        corners = [(self._across(x), self._down(y)) for x, y in points]
        self._taken += [((x - 1, y - 1, x + 1, y + 1), _LINE * opacity) for x, y in _along(corners)]
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        drawn = f'stroke="{color}" stroke-width="{width:g}" stroke-opacity="{opacity:g}"'
        self._shapes.append(f'<polyline points="{at}" fill="none" {drawn}{_DASHED * dashed}/>')

    def mark(self, point: Point, marker: Marker, told: str = "", *, label: str = "") -> None:
        """A point; `told` is shown where a pointer rests on it, `label` beside it, where there is most room."""
        x, y = self._across(point[0]), self._down(point[1])
        self._shapes.append(_marked(x, y, marker, told))
        reach = marker.radius + 1
        self._taken.append(((x - reach, y - reach, x + reach, y + reach), _MARK))
        if label:
            self._labels.append(((x, y), label))

    def legend(self, text: str, marker: Marker) -> None:
        """Say what a marker stands for."""
        self._legend.append((text, marker))

    def __str__(self) -> str:
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {_HEIGHT}" role="img" '
            f'aria-label={quoteattr(self._title)} font-family="sans-serif" font-size="12">',
            f'<rect width="{self.width}" height="{_HEIGHT}" fill="#ffffff"/>',
            _text(_LEFT, 24, self._title, size=15),
            *self._axes(),
            *self._shapes,
            *self._placed(),
        ]
        x = float(_LEFT)
        for text, marker in self._legend:
            parts += [_marked(x, _HEIGHT - 14, marker), _text(x + 10, _HEIGHT - 10, text)]
            x += 32 + _LETTER * len(text)
        return "\n".join([*parts, "</svg>"]) + "\n"

    def _placed(self) -> Iterator[str]:
        """The labels over everything else, each where it hides least of marks, lines and the labels before it."""
        taken = list(self._taken)
        for (x, y), label in self._labels:
            width = _LETTER * len(label)
            lefts, baselines = (x + 8, x - 8 - width, x - width / 2), (y - 7, y + 16, y + 4)
            corners = [(left, baseline) for baseline in baselines for left in lefts][:-1]  # not on the mark itself
            boxes = [(left, baseline - 11, left + width, baseline + 3) for left, baseline in corners]
            box = min(boxes, key=lambda box: self._outside(box) + sum(cost for one, cost in taken if _meet(box, one)))
            taken.append((box, _MARK))
            yield _text(box[0], box[3] - 3, label, more='fill="none" stroke="#ffffff" stroke-width="3"')
            yield _text(box[0], box[3] - 3, label)

    def _outside(self, box: _Box) -> float:
        """What it counts where a box leaves the axes."""
        left, top, right, bottom = box
        inside = left >= _LEFT and top >= _TOP and right <= self.width - _RIGHT and bottom <= _HEIGHT - _BOTTOM
        return 0.0 if inside else 2 * _MARK

    def _axes(self) -> Iterator[str]:
        right, bottom = self.width - _RIGHT, _HEIGHT - _BOTTOM
        for value in self._x.ticks():
            yield _rule(self._across(value), _TOP, self._across(value), bottom)
            yield _text(self._across(value), bottom + 18, f"{value:g}", anchor="middle")
        for value in self._y.ticks():
            yield _rule(_LEFT, self._down(value), right, self._down(value))
            yield _text(_LEFT - 6, self._down(value) + 4, f"{value:g}", anchor="end")
        yield _text((_LEFT + right) / 2, bottom + 38, self._x.label, anchor="middle")
        turned = f'transform="rotate(-90 16 {(_TOP + bottom) / 2:.1f})"'
        yield _text(16, (_TOP + bottom) / 2, self._y.label, anchor="middle", more=turned)

    def _across(self, x: float) -> float:
        return _LEFT + (x - self._x.low) / (self._x.high - self._x.low) * (self.width - _LEFT - _RIGHT)

    def _down(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - self._y.low) / (self._y.high - self._y.low) * (_HEIGHT - _TOP - _BOTTOM)


def side_by_side(charts: Sequence[Chart]) -> str:
    """Several charts as one SVG, from left to right."""
    width, x, parts = sum(chart.width for chart in charts), 0, []
    for chart in charts:
        parts.append(str(chart).replace("<svg ", f'<svg x="{x}" width="{chart.width}" height="{_HEIGHT}" ', 1))
        x += chart.width
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" viewBox="0 0 {width} {_HEIGHT}">'
    )
    return "\n".join([opening, *parts]) + "</svg>\n"


def _along(corners: Sequence[Point]) -> Iterator[Point]:
    """Points of a line, a few units from one another."""
    for (x1, y1), (x2, y2) in pairwise(corners):
        count = math.ceil(math.hypot(x2 - x1, y2 - y1) / 4)
        yield from ((x1 + (x2 - x1) * at / count, y1 + (y2 - y1) * at / count) for at in range(count))


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _marked(x: float, y: float, marker: Marker, told: str = "") -> str:
    style = f'fill="{marker.color if marker.filled else "#ffffff"}" stroke="{marker.color}"'
    inside = f"<title>{escape(told)}</title>" if told else ""
    if marker.shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{marker.radius:g}" {style}>{inside}</circle>'
    corners = " ".join(
        f"{x + marker.radius * dx:.1f},{y + marker.radius * dy:.1f}" for dx, dy in _CORNERS[marker.shape]
    )
    return f'<polygon points="{corners}" {style}>{inside}</polygon>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(text)}</text>'
