"""A run's timeline as a picture: `python -m tandemrt.bench.timeline TRACE.json --svg FILE.svg`.

TRACE.json is what `tandemrt generate --trace` wrote. Threads are lanes, and bars lie under those they are part of, as
in ui.perfetto.dev; each bar tells its name and length under the pointer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tandemrt.runtime.errors import ArgumentError

from .figures import write_text
from .program import run_program

WIDTH, MARGIN, LABELS = 1200, 16, 130
BAR, GAP, AXIS = 20, 2, 24
# About as wide as the font's letters are.
LETTER = 6.8
COLOURS = {
    "text": "#8f6ac8", "load": "#b0b4ba", "row": "#d9dde3", "bind": "#c8a24a", "model": "#2f7ed8", "update": "#e0693a",
    "decode": "#3a9d6a", "pictures": "#3a9d6a", "preview": "#8cc9a8",
}  # fmt: skip
UNCONDITIONAL = "#6fb1f2"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a thread did: microseconds since the trace began, and how many bars it lies in."""

    name: str
    category: str
    began: float
    lasted: float
    depth: int


def bars(facts: Mapping[str, Any]) -> Iterator[tuple[str, list[Bar]]]:
    """The lanes of a trace by their threads' names, in the order they came in."""
    spans = [event for event in facts["traceEvents"] if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in facts["traceEvents"] if event["ph"] == "M"}
    start = min(event["ts"] for event in spans)
    for thread in dict.fromkeys(event["tid"] for event in spans):
        made: list[Bar] = []
        open_until: list[float] = []
        for event in spans:
            if event["tid"] == thread:
                while open_until and event["ts"] >= open_until[-1]:
                    open_until.pop()
                began = event["ts"] - start
                made.append(Bar(event["name"], event["cat"], began, event["dur"], len(open_until)))
                open_until.append(event["ts"] + event["dur"])
        yield names[thread], made


def drawn(facts: Mapping[str, Any]) -> str:
    """The picture, as SVG."""
    lanes = list(bars(facts))
    end = max(bar.began + bar.lasted for _, lane in lanes for bar in lane)
    scale = (WIDTH - LABELS - 2 * MARGIN) / end
    parts, top = [], MARGIN + AXIS
    for name, lane in lanes:
        parts.append(f'<text x="{MARGIN}" y="{top + 14}" class="lane">{escape(name)}</text>')
        parts += [_bar(bar, top, scale) for bar in lane]
        top += (max(bar.depth for bar in lane) + 1) * (BAR + GAP) + 2 * GAP
    height = top + MARGIN
    style = (
        "text{font:11px sans-serif;fill:#1c1e22}.lane{fill:#70747c}.axis{stroke:#e4e6ea}.inside{pointer-events:none}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
        f'<style>{style}</style><rect width="{WIDTH}" height="{height}" fill="#fcfbf8"/>'
        + "".join([*_axis(end, scale, height), *parts])
        + "</svg>\n"
    )


def _bar(bar: Bar, lanes_top: int, scale: float) -> str:
    x, width = MARGIN + LABELS + bar.began * scale, max(bar.lasted * scale, 0.5)
    y = lanes_top + bar.depth * (BAR + GAP)
    colour = UNCONDITIONAL if "(unconditional" in bar.name else COLOURS.get(bar.category, "#b0b4ba")
    told = f"<title>{escape(bar.name)}: {bar.lasted / 1e3:.2f} ms</title>"
    box = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}">{told}</rect>'
    letters = int((width - 6) / LETTER)
    if letters < 3:
        return box
    label = bar.name if len(bar.name) <= letters else bar.name[: letters - 1] + "…"
    return box + f'<text x="{x + 3:.1f}" y="{y + 14}" class="inside">{escape(label)}</text>'


def _axis(end: float, scale: float, height: int) -> Iterator[str]:
    """A line about every tenth of the time, at 1, 2 or 5 times a power of ten milliseconds."""
    step = next(
        factor * 10**power for power in range(-3, 9) for factor in (1, 2, 5) if factor * 10**power >= end / 1e3 / 10
    )
    for index in range(int(end / 1e3 / step) + 1):
        x = MARGIN + LABELS + index * step * 1e3 * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{MARGIN + 14}" y2="{height - MARGIN}" class="axis"/>'
        yield f'<text x="{x + 2:.1f}" y="{MARGIN + 8}" class="lane">{index * step:g} ms</text>'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE.json")
    parser.add_argument("--svg", type=Path, required=True, metavar="FILE.svg")
    given = parser.parse_args(arguments)
    try:
        picture = drawn(json.loads(given.trace.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            str(given.trace), "no timeline", got=f"{type(error).__name__}: {error}",
            remedy="Write one with `tandemrt generate --trace`.",
        ) from error  # fmt: skip
    write_text(given.svg, picture)


if __name__ == "__main__":
    run_program(main)
