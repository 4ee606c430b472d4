"""Charts of lines and marks between two axes, as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart with any colour vision
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 442, 64, 20, 40, 78
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
    shape: Literal["circle", "square", "triangle", "diamond"] = "circle"
    radius: float = 4.0
    filled: bool = True


class Chart:
    """Shapes in the axes' own units; `str` of it is the SVG, of so many units of width."""

    def __init__(self, title: str, x: Axis, y: Axis, *, width: int = _WIDTH) -> None:
        self.width = width
        self._title, self._x, self._y = title, x, y
        self._shapes: list[str] = []
        self._legend: list[tuple[str, Marker]] = []

    @property
    def y_ends(self) -> tuple[float, float]:
        """The ends of the vertical axis."""
        return self._y.low, self._y.high

    def line(
        self, points: Sequence[Point], color: str, *, width: float = 2.0, opacity: float = 1.0, dashed: bool = False
    ) -> None:
        """Straight lines from point to point."""
        at = " ".join(f"{self._across(x):.1f},{self._down(y):.1f}" for x, y in points)
        drawn = f'stroke="{color}" stroke-width="{width:g}" stroke-opacity="{opacity:g}"'
        self._shapes.append(f'<polyline points="{at}" fill="none" {drawn}{_DASHED * dashed}/>')

    def mark(self, point: Point, marker: Marker, told: str = "", *, label: str = "") -> None:
        """A point; `told` is shown where a pointer rests on it, `label` beside it."""
        x, y = self._across(point[0]), self._down(point[1])
        self._shapes.append(_marked(x, y, marker, told))
        if label:
            room = 7 * len(label) + 8 < self.width - x
            place = (x + 8, "start") if room else (x - 6, "end")
            self._shapes.append(_text(place[0], y - 8, label, anchor=place[1]))

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
        ]
        x = float(_LEFT)
        for text, marker in self._legend:
            parts += [_marked(x, _HEIGHT - 14, marker), _text(x + 10, _HEIGHT - 10, text)]
            x += 26 + 6.5 * len(text)
        return "\n".join([*parts, "</svg>"]) + "\n"

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
