"""A report as one HTML page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from tandemrt.calibrate.svg import COLORS, Axis, Chart, Marker

from .precision import with_precisions
from .schema import MORE_IS_BETTER, Plot, Report, Row, Section
from .told import SPREAD, Table, failures, number, setting_lines, table_of, with_spread

# Words of more letters are given room, to be read in a few lines.
_LONG = 20
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5a5a66; --paper: #ffffff; --line: #d9d9e0;
  --bar: #0072b2; --first: #d55e00; --warn: #fff3d6; --warn-line: #d9a400; --shade: #00000038 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ee; --soft: #a5a5b2; --paper: #16161a; --line: #35353f;
  --bar: #56b4e9; --first: #e69f00; --warn: #33290d; --warn-line: #a88200; --shade: #ffffff40 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem }
p { max-width: 46rem } .soft { color: var(--soft) }
.first { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .6rem 1rem; margin: 1rem 0 }
.first ul { margin: .3rem 0; padding-left: 1.2rem }
/* A shade at an edge where more can be scrolled to: what scrolls along covers it at the end. */
.wide { overflow-x: auto; background: linear-gradient(to left, var(--paper) 30%, transparent) right / 2.5rem 100%,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100%, var(--paper);
  background-repeat: no-repeat; background-attachment: local, scroll, scroll }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums;
  font-size: .9rem; line-height: 22px }
th, td { padding: 6px 11px; border-bottom: 1px solid var(--line); text-align: right }
th { font-weight: 600; vertical-align: bottom }
td:first-child, td small { white-space: nowrap } td small { font-size: inherit; color: var(--soft) }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper) }
.words { text-align: left } td.long { min-width: 10.5rem }
.bars { font-size: .9rem; max-width: 54rem }
.one { display: grid; grid-template: "name track value" / 15rem 1fr 12rem; gap: .8rem; padding: .18rem 0;
  align-items: center }
.name { grid-area: name } .track { grid-area: track } .value { grid-area: value }
.track { position: relative; height: 1.1rem; margin: 0 3px }
.bar { position: absolute; inset: .15rem auto .15rem 0; background: var(--bar); border-radius: 2px }
.own .bar { background: var(--first) }
.range { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--ink) }
.round { position: absolute; top: 50%; width: 5px; height: 5px; margin: -2.5px; border-radius: 50%;
  background: var(--paper); border: 1px solid var(--ink) }
figure { margin: 1rem 0 } figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem }
svg { width: 100%; min-width: 34rem; max-width: 52rem; height: auto }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 40rem) { td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem }
  th, td { padding: 6px } table { font-size: .8rem } svg { min-width: 0 }
  dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem }
  .one { grid-template: "name value" "track track" / 1fr max-content; gap: 0 .8rem; padding: .3rem 0 } }
"""


def page(report: Report) -> str:
    """The page, a whole HTML document."""
    title = escape(report.title)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            f'<p class="soft">{escape(report.machine.processor)}, {report.began[:10]}</p>',
            *_first(report),
            f'<p class="soft">{SPREAD}</p>',
            *(line for section in with_precisions(report).sections for line in _section(section)),
            "<h2>How it was measured</h2><dl>",
            *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in setting_lines(report)),
            "</dl></body></html>\n",
        ]
    )


def _first(report: Report) -> Iterator[str]:
    if report.caveats:
        told = "".join(f"<li>{_sentence(caveat)}</li>" for caveat in report.caveats)
        yield f'<div class="first"><strong>Know first</strong><ul>{told}</ul></div>'


def _section(section: Section) -> Iterator[str]:
    yield f'<h2 id="{_anchor(section.key)}">{escape(section.title)}</h2>'
    if section.note:
        yield f"<p>{_sentence(section.note)}</p>"
    for plot in section.plots:
        drawn = _front(section, plot) if plot.x else _bars(section, plot)
        if drawn:
            yield f"<figure>{drawn}</figure>"
    yield from _table(table_of(section))
    yield from (f'<p class="soft">{_sentence(failure)}</p>' for failure in failures(section))


def _table(table: Table) -> Iterator[str]:
    """A table that scrolls inside itself where it is wider than the page."""
    kinds = [_kind(table, at) for at in range(len(table.heads))]
    heads = (f'<th scope="col"{kind}>{escape(head)}</th>' for kind, head in zip(kinds, table.heads, strict=True))
    yield f'<div class="wide" tabindex="0"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>'
    for cells in table.rows:
        told = "".join(f"<td{kind}>{_figure(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))
        yield f"<tr>{told}</tr>"
    yield "</tbody></table></div>"


def _kind(table: Table, at: int) -> str:
    """The class of a column: whether it holds words, and any that are to have room."""
    if at not in table.words:
        return ""
    return ' class="words long"' if any(len(row[at]) > _LONG for row in table.rows) else ' class="words"'


def _figure(cell: str) -> str:
    """A cell in HTML: where the column is narrow, a spread in brackets stands below its median."""
    return re.sub(r"^(\S+) (\([^ )]+\))$", r"\1 <small>\2</small>", escape(cell))


def _anchor(key: str) -> str:
    """What a link to a section names, without what HTML refuses there."""
    return re.sub(r"[^\w.]+", "-", key)


def _sentence(text: str) -> str:
    """Text in HTML; what Markdown has as code is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _bars(section: Section, plot: Plot) -> str:
    """Rows below each other: a bar to the median, a line over the spread, a dot for a round."""
    rows = [row for row in section.rows if plot.y in row.figures]
    if not rows:
        return ""
    most = max(float(row.figures[plot.y].values.max()) for row in rows) or 1.0
    caption = f"<figcaption>{escape(plot.title)}</figcaption>"
    return f'{caption}<div class="bars">{"".join(_bar(row, plot.y, most, section.baseline) for row in rows)}</div>'


def _bar(row: Row, name: str, most: float, baseline: str) -> str:
    figure = row.figures[name]
    low, median, high = (100 * value / most for value in figure.spread)
    rounds = "".join(f'<i class="round" style="left:{100 * value / most:.2f}%"></i>' for value in figure.samples)
    own = " own" if row.name == baseline else ""
    return (
        f'<div class="one"><span class="name">{escape(row.name)}</span>'
        f'<span class="track{own}"><i class="bar" style="width:{median:.2f}%"></i>'
        f'<i class="range" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>{rounds}</span>'
        f'<span class="value">{with_spread(figure)} {escape(figure.unit)}</span></div>'
    )


def _front(section: Section, plot: Plot) -> str:
    """Points at the rows' medians, and a line through those that no other beats in both."""
    points = [
        (row.name, (row.figures[plot.x].median, row.figures[plot.y].median))
        for row in section.rows
        if plot.x in row.figures and plot.y in row.figures
    ]
    if not points:
        return ""
    units = {
        name: next(row.figures[name].unit for row in section.rows if name in row.figures) for name in (plot.x, plot.y)
    }
    titles = {column.of: column.title for column in reversed(section.columns)}  # a figure's first column names it
    axes = [
        Axis.around(titles.get(name, f"{name}, {units[name]}"), [place[index] for _, place in points])
        for index, name in enumerate((plot.x, plot.y))
    ]
    chart = Chart(plot.title, axes[0], axes[1])
    more = tuple(units[name] in MORE_IS_BETTER for name in (plot.x, plot.y))
    chart.line(sorted(unbeaten([place for _, place in points], more)), COLORS[0])
    for name, place in points:
        told = f"{name}: {number(place[0])} {units[plot.x]}, {number(place[1])} {units[plot.y]}"
        chart.mark(place, Marker(COLORS[0]), told, label=name)
    return f'<div class="wide">{chart}</div>'


def unbeaten(points: Sequence[tuple[float, float]], more: tuple[bool, ...]) -> list[tuple[float, float]]:
    """The points that no other beats: as good in both and better in one. more: whether more is better, of each."""
    signs = [1 if each else -1 for each in more]
    goods = [(signs[0] * x, signs[1] * y) for x, y in points]
    return [
        point
        for point, good in zip(points, goods, strict=True)
        if not any(one[0] >= good[0] and one[1] >= good[1] and one != good for one in goods)
    ]
