"""The demo on a bundle that is there, and what it says when it cannot run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tandemrt.bench.demo import DemoPlan, require_packages, run, summary
from tandemrt.bench.shapes.scenes import scenes
from tandemrt.bench.showcase import COLUMNS, sheet_rows
from tandemrt.runtime.errors import ArgumentError, BundleError, TandemError


class Listener:
    def __init__(self):
        self.labels = []

    def progress(self, label, done, total):
        assert 0 <= done <= total
        self.labels.append(label)


@pytest.mark.slow
def test_the_demo_leaves_a_sheet_and_its_table(shapes_bundle, tmp_path):
    listener = Listener()
    facts = run(DemoPlan(tmp_path / "out", prompts=6, bundle=shapes_bundle), listener)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact-sheet.png", "table.json", "table.md"]
    assert json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8")) == facts
    assert [row["name"] for row in facts["columns"]] == list(COLUMNS)
    assert all(row["all_right"]["trials"] == len(row["times_ms"]) == 6 for row in facts["columns"])
    assert set(COLUMNS) <= set(listener.labels)
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.width > 4 * 3 * 64
        assert sheet.height > 6 * 3 * 64
    lines = list(summary(facts))
    for row in facts["columns"]:
        assert any(row["name"] in line and f"{row['parameters']:,}" in line for line in lines)
    assert any("contact-sheet.png" in line for line in lines)
    assert lines[-1].startswith("paint: ")
    assert f"generate {shapes_bundle} --prompt" in lines[-1]


def test_the_sheet_shows_single_items_and_pairs():
    chosen = scenes(0, 60, "held_out")
    rows = sheet_rows(chosen)
    assert [len(chosen[index].items) for index in rows] == [1, 1, 2, 2, 2, 2]
    pairs = [scene for scene in chosen if len(scene.items) == 2][:7]
    assert sheet_rows(pairs) == [0, 1, 2, 3, 4, 5]


def test_fewer_prompts_than_the_sheet_shows_are_refused():
    with pytest.raises(ArgumentError, match=r"--prompts: .* got 5, expected 6 or more"):
        DemoPlan(Path("out"), prompts=5)


def test_missing_packages_are_named_with_the_extras_that_bring_them():
    wanted = {"json": "cpu", "tandemrt_no_such_package": "export", "tandemrt_nor_this_one": "bench"}
    with pytest.raises(TandemError, match="got 'tandemrt_no_such_package, tandemrt_nor_this_one'") as caught:
        require_packages(wanted)
    assert 'pip install "tandemrt[export,bench]"' in str(caught.value)
    require_packages({"json": "cpu"})


def test_an_output_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ArgumentError, match="--output-dir: cannot be written"):
        run(DemoPlan(tmp_path / "file" / "out", bundle=tmp_path), Listener())


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        run(DemoPlan(tmp_path / "out", bundle=tmp_path), Listener())
