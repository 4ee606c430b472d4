"""Charts: well-formed, with everything inside the axes."""

from __future__ import annotations

import itertools
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


def test_labels_hide_no_marks_lines_or_labels_and_stay_within() -> None:
    """One is beside the edge, one in a corner, and one has a mark where the first two are written."""
    chart = Chart("", Axis("", 0, 100), Axis("", 0, 100))
    points = [(50, 50), (54, 53), (55, 54), (99, 99), (1, 1)]
    for number, point in enumerate(points):
        chart.mark(point, Marker(COLORS[0]), label=f"label {number}")
    chart.line([(0, 40), (100, 40)], COLORS[1])
    shapes = list(ElementTree.fromstring(str(chart)))
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in shapes if dot.tag == f"{SVG}circle"]
    labels = [shape for shape in shapes if (shape.text or "").startswith("label") and "stroke" not in shape.attrib]
    assert (len(labels), len(dots)) == (5, 5)
    boxes = []
    for label in labels:
        left, baseline = float(label.attrib["x"]), float(label.attrib["y"])
        boxes.append((left, baseline - 10, left + 6 * len("label 0"), baseline))
    for left, top, right, bottom in boxes:
        assert left >= 64 and right <= 700 and top >= 40 and bottom <= 364
        assert not any(left < x < right and top < y < bottom for x, y in dots)
        assert not top < 234.4 < bottom
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert shapes.index(labels[0]) > max(shapes.index(shape) for shape in shapes if shape.tag == f"{SVG}polyline")


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
