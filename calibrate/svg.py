"""A chart of lines and dots between two axes, as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart with any colour vision
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 420, 64, 20, 40, 56


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


class Chart:
    """Shapes in the axes' own units; `str` of it is the SVG."""

    def __init__(self, title: str, x: Axis, y: Axis) -> None:
        self._title, self._x, self._y = title, x, y
        self._shapes: list[str] = []
        self._legend: list[tuple[str, str]] = []

    def line(self, points: Sequence[Point], color: str, *, width: float = 2.0, opacity: float = 1.0) -> None:
        """Straight lines from point to point."""
        at = " ".join(f"{self._across(x):.1f},{self._down(y):.1f}" for x, y in points)
        drawn = f'stroke="{color}" stroke-width="{width:g}" stroke-opacity="{opacity:g}"'
        self._shapes.append(f'<polyline points="{at}" fill="none" {drawn}/>')

    def dot(self, point: Point, color: str, told: str, *, filled: bool = True) -> None:
        """A dot; `told` is shown where a pointer rests on it."""
        x, y = self._across(point[0]), self._down(point[1])
        fill = color if filled else "#ffffff"
        drawn = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{color}">'
        self._shapes.append(f"{drawn}<title>{escape(told)}</title></circle>")

    def legend(self, text: str, color: str) -> None:
        """Say what a colour stands for."""
        self._legend.append((text, color))

    def __str__(self) -> str:
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label={quoteattr(self._title)} font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
            _text(_LEFT, 24, self._title, size=15),
            *self._axes(),
            *self._shapes,
        ]
        for row, (text, color) in enumerate(self._legend):
            y = _TOP + 14 + 18 * row
            parts.append(f'<rect x="{_WIDTH - _RIGHT - 150}" y="{y - 9}" width="10" height="10" fill="{color}"/>')
            parts.append(_text(_WIDTH - _RIGHT - 134, y, text))
        return "\n".join([*parts, "</svg>"]) + "\n"

    def _axes(self) -> Iterator[str]:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for value in self._x.ticks():
            yield _rule(self._across(value), _TOP, self._across(value), bottom)
            yield _text(self._across(value), bottom + 18, f"{value:g}", anchor="middle")
        for value in self._y.ticks():
            yield _rule(_LEFT, self._down(value), right, self._down(value))
            yield _text(_LEFT - 6, self._down(value) + 4, f"{value:g}", anchor="end")
        yield _text((_LEFT + right) / 2, _HEIGHT - 14, self._x.label, anchor="middle")
        turned = f'transform="rotate(-90 16 {(_TOP + bottom) / 2:.1f})"'
        yield _text(16, (_TOP + bottom) / 2, self._y.label, anchor="middle", more=turned)

    def _across(self, x: float) -> float:
        return _LEFT + (x - self._x.low) / (self._x.high - self._x.low) * (_WIDTH - _LEFT - _RIGHT)

    def _down(self, y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - self._y.low) / (self._y.high - self._y.low) * (_HEIGHT - _TOP - _BOTTOM)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(text)}</text>'
