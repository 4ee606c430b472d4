"""How figures are summed up and written."""

import json

import pytest

from tandemrt.bench.figures import markdown_table, spread, write_json, write_report, write_text


def test_spread_names_the_median_and_what_surrounds_it():
    assert spread([5, 1, 2, 3, 4, 100, 0, 6, 7, 8, 9]) == {
        "median": 5.0,
        "p10": 1.0,
        "p90": 9.0,
        "minimum": 0.0,
        "maximum": 100.0,
        "count": 11,
    }


def test_markdown_table_has_a_ruler_and_a_line_for_each_row():
    table = markdown_table(("way", "ms"), [("25/0", "3"), ("0/25", "1")])
    assert table == "| way | ms |\n| --- | ---: |\n| 25/0 | 3 |\n| 0/25 | 1 |\n"


def test_a_file_is_written_into_a_new_folder_and_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"value": 1})
    write_json(path, {"value": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 2}
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_a_figure_json_has_no_word_for_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"value": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 1.0}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_text(tmp_path / "taken", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_report_is_json_with_its_table_beside_it(tmp_path, capsys):
    write_report(tmp_path / "made" / "one.json", {"median": 1.5}, "| one |\n\n")
    assert json.loads((tmp_path / "made" / "one.json").read_text()) == {"median": 1.5}
    assert (tmp_path / "made" / "one.md").read_text() == "| one |\n" == capsys.readouterr().out
