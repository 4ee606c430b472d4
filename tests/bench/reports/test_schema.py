"""Reports as files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tandemrt.bench.reports import schema
from tandemrt.bench.reports.schema import Figure, json_schema, read_report, write_report_json
from tandemrt.runtime.errors import BenchmarkError

from .sample import OURS, PEER, report


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_report_json(tmp_path / "report.json", report())
    assert read_report(tmp_path / "report.json") == report()


def test_the_schema_that_is_kept_is_that_of_the_structs() -> None:
    kept = Path(schema.__file__).with_name("report.schema.json").read_text(encoding="utf-8")
    assert json.loads(kept) == json.loads(msgspec.json.encode(json_schema()))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "is no report"),
        (b'{"format": "tandemrt.bench/2"}', "is no report"),
        (b'{"format": "tandemrt.bench/1", "title": 3}', "is no report"),
    ],
)
def test_a_file_that_is_none_is_told(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(BenchmarkError, match=told):
        read_report(tmp_path / "report.json")


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"report\.json: cannot be read \(No such file"):
        read_report(tmp_path / "report.json")


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report_json(tmp_path / "report.json", report(ours=(1.0, float("nan"), 1.0, 1.0)))
    assert not list(tmp_path.iterdir())


def test_ratios_are_of_the_same_round() -> None:
    (section,) = report(ours=(1.0, 2.0, 4.0, 1.0), peer=(2.0, 4.0, 8.0, 2.0)).sections
    peer, own = section.row(PEER), section.row(OURS)
    assert peer is not None and own is not None
    ratios = section.ratios(peer, "total")
    assert ratios is not None
    assert ratios == Figure(unit="times", samples=(2.0,) * 4)
    assert section.ratios(peer, "other") is None


def test_percentiles_lie_between_samples() -> None:
    figure = Figure(unit="s", samples=(1.0, 2.0, 3.0, 4.0))
    assert (figure.median, figure.at(99)) == (2.5, pytest.approx(3.97))
