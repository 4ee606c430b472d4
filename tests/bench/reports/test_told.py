"""Reports as Markdown and as a page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from tandemrt.bench.reports.files import NAMES, require_free, write_report_files
from tandemrt.bench.reports.markdown import markdown, section_table
from tandemrt.bench.reports.page import page, unbeaten
from tandemrt.bench.reports.schema import Column, Figure, Plot, Row, Section, Unit
from tandemrt.bench.reports.told import number, setting_lines, table_of, with_spread
from tandemrt.runtime.errors import BenchmarkError

from .sample import OURS, PEER, machine, report

VOID = {"meta", "link", "br", "rect", "line", "circle", "polygon", "polyline"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (999.9, "1,000"), (1e-9, "0.000000")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_has_a_cell_for_every_head() -> None:
    (section,) = report().sections
    table = table_of(section)
    assert table.heads == ("", "s, p50", "s, p90", "s, p99", "times ours")
    assert {len(row) for row in table.rows} == {5}
    assert table.rows[1] == (PEER, "2.00", "2.01", "2.02", "2.00 (2.00–2.00)")
    assert table.rows[2][1] == "not measured"


@pytest.mark.parametrize(
    ("unit", "samples", "told"),
    [
        ("s", (1.0, 2.0, 3.0, 4.0), "2.50 (1.00–4.00)"),
        ("s", (1.0, 2.0, 3.0, 4.0, 5.0), "3.00 (1.40–4.60)"),
        ("dB", (10.0, 20.0, 30.0, 40.0, 50.0), "30.0 (10.0–50.0)"),
        ("s", (1.0,), "1.00"),
    ],
)
def test_of_few_rounds_and_of_psnr_the_whole_range_is_told(unit: Unit, samples: tuple[float, ...], told: str) -> None:
    assert with_spread(Figure(unit=unit, samples=samples)) == told


def test_markdown_begins_with_what_to_know() -> None:
    text = markdown(report())
    assert text.index("Other work ran beside.") < text.index(OURS)
    assert "- optimum: has no environment yet" in text
    assert f"| {PEER} | 2.00 |" in text
    assert "10,15" in text


def test_shares_of_a_whole_and_of_a_limit_are_percentages() -> None:
    figures = {unit: Figure(unit=unit, samples=(0.5,)) for unit in ("share", "limit")}
    columns = tuple(Column(of=unit, title=unit) for unit in figures)
    table = table_of(Section(key="k", title="t", columns=columns, rows=(Row(name="a", figures=figures),)))
    assert table.rows == (("a", "50.0%", "50.0%"),)


def test_the_setting_tells_of_energy_and_of_other_work() -> None:
    told = dict(setting_lines(report()))
    assert told["energy"] == "of all processors (package-0)" and "other work" not in told
    told = dict(setting_lines(msgspec.structs.replace(report(), machine=machine(other_cores=0.5))))
    assert told["other work"] == "0.50 of 2 cores on average"


def test_the_page_is_whole_and_fetches_nothing() -> None:
    text = page(report())
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "img", "iframe")
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag not in VOID:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in VOID:
                assert open_tags.pop() == tag

    Reader().feed(text)
    assert not open_tags
    assert "url(" not in text
    assert "a &lt;bundle&gt;: a benchmark" in text
    assert "Know first" in text


def test_words_are_where_their_column_is() -> None:
    columns = (Column(of="ms", title="ms", shown="percentiles"), Column(of="ran", title="on", shown="words"))
    rows = (Row(name="a", words={"ran": "graph"}, figures={"ms": Figure(unit="ms", samples=(1.0,))}),)
    section = Section(key="k", title="t", columns=columns, rows=rows)
    text = page(msgspec.structs.replace(report(), sections=(section,)))
    assert '<th scope="col" class="words">on</th>' in text and '<td class="words">graph</td>' in text
    assert text.count('class="words"') == 2
    long = msgspec.structs.replace(rows[0], words={"ran": "graph, as an engine of it is damaged"})
    section = msgspec.structs.replace(section, rows=(*rows, long))
    text = page(msgspec.structs.replace(report(), sections=(section,)))
    assert text.count('class="words long"') == 3 and '<div class="wide" tabindex="0"><table>' in text


def test_words_are_aligned_left_in_markdown() -> None:
    columns = (Column(of="ms", title="ms"), Column(of="ran", title="on", shown="words"))
    rows = (Row(name="a", words={"ran": "graph"}, figures={"ms": Figure(unit="ms", samples=(1.0,))}),)
    assert "\n| --- | ---: | --- |\n" in section_table(Section(key="k", title="t", columns=columns, rows=rows))


def test_the_pages_sections_can_be_linked_and_its_code_is_code() -> None:
    note = "`bench <cold>` repeats it, a ` does not."
    section = msgspec.structs.replace(report().sections[0], key="build openvino:cpu:bf16", note=note)
    caveats = ("`unet` ran in fp32.",)
    text = page(msgspec.structs.replace(report(), sections=(section,), caveats=caveats))
    assert '<h2 id="build-openvino-cpu-bf16">' in text
    assert "<p><code>bench &lt;cold&gt;</code> repeats it, a ` does not.</p>" in text
    assert "<li><code>unet</code> ran in fp32.</li>" in text


def test_a_spread_can_stand_below_its_median() -> None:
    text = page(report())
    assert "<td>2.00 <small>(2.00–2.00)</small></td>" in text and "<td>2.00</td>" in text


def test_bars_show_every_round() -> None:
    assert page(report()).count('class="round"') == 8


def test_the_axes_of_points_are_called_as_their_columns_are() -> None:
    figures = {"total": Figure(unit="s", samples=(1.0,)), "psnr": Figure(unit="dB", samples=(30.0,))}
    section = Section(
        key="k",
        title="t",
        columns=(Column(of="total", title="s a picture"), Column(of="total", title="times a", shown="ratio")),
        rows=(Row(name="a", figures=figures),),
        plots=(Plot(title="Time and closeness", x="total", y="psnr"),),
    )
    text = page(msgspec.structs.replace(report(), sections=(section,)))
    assert ">s a picture</text>" in text and ">psnr, dB</text>" in text
    assert "times a</text>" not in text and text.count(">Time and closeness<") == 1


def test_a_front_is_of_what_no_other_beats() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (2.0, 4.0), (3.0, 1.0)]
    assert unbeaten(points, (False, False)) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert unbeaten(points, (False, True)) == [(1.0, 3.0), (2.0, 4.0)]


def test_three_files_are_written(tmp_path: Path) -> None:
    write_report_files(tmp_path / "out", report())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    with pytest.raises(BenchmarkError, match="exists already"):
        require_free(tmp_path / "out", force=False)
    require_free(tmp_path / "out", force=True)


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("taken", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="is no folder"):
        require_free(tmp_path / "out", force=True)
