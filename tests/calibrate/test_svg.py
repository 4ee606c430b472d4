"""Charts: well-formed, with everything inside the axes."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandemrt.calibrate.svg import COLORS, Axis, Chart, Marker, side_by_side

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_is_well_formed_and_shows_what_it_was_given() -> None:
    chart = Chart("a < b & c", Axis("rows", 0, 10), Axis("dB", 20, 40))
    chart.line([(0, 20), (10, 40)], COLORS[0])
    chart.mark((5, 30), Marker(COLORS[1], filled=False), 'a "dot" <here>', label="5 & 30")
    chart.legend("one", Marker(COLORS[0], "square"))
    root = ElementTree.fromstring(str(chart))
    assert root.attrib["aria-label"] == "a < b & c"
    (line,) = root.findall(f"{SVG}polyline")
    assert line.attrib["points"] == "64.0,364.0 700.0,40.0"
    (dot,) = root.findall(f"{SVG}circle")
    assert (dot.attrib["cx"], dot.attrib["cy"]) == ("382.0", "202.0")
    assert [title.text for title in dot] == ['a "dot" <here>']
    texts = {text.text for text in root.findall(f"{SVG}text")}
    assert {"one", "5 & 30"} <= texts
    assert len(root.findall(f"{SVG}polygon")) == 1


def test_charts_stand_side_by_side() -> None:
    charts = [Chart(title, Axis("x", 0, 1), Axis("y", 0, 1), width=width) for title, width in (("a", 300), ("b", 200))]
    root = ElementTree.fromstring(side_by_side(charts))
    inner = root.findall(f"{SVG}svg")
    assert root.attrib["viewBox"].split()[2] == "500"
    assert [(one.attrib["x"], one.attrib["width"], one.attrib["aria-label"]) for one in inner] == [
        ("0", "300", "a"),
        ("300", "200", "b"),
    ]


@example(1.0, 120001.0)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_within_and_neither_few_nor_many(low: float, extent: float) -> None:
    axis = Axis("", low, low + extent)
    ticks = list(axis.ticks())
    assert 3 <= len(ticks) <= 9
    assert all(axis.low - 1e-6 * extent <= tick <= axis.high + 1e-6 * extent for tick in ticks)


@pytest.mark.parametrize("values", [[3.0], [1.0, 9.0]])
def test_an_axis_has_room_around_its_values(values: list[float]) -> None:
    axis = Axis.around("dB", values)
    assert axis.low < min(values) <= max(values) < axis.high
