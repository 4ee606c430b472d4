"""The shapes family's bundle: what makes it outdated, and what stands in its way."""

from __future__ import annotations

import json
import shutil

import pytest

from tandemrt.bench.shapes import bundle as bundles
from tandemrt.bench.shapes.bundle import WEIGHTS, ensure_bundle, expected_digests, export_plan
from tandemrt.runtime.errors import ExportError


def test_a_changed_scheduler_makes_a_bundle_outdated(tmp_path):
    """In either place that a scheduler is read from; the digests of the models stay as they are."""
    weights = tmp_path / "weights"
    for folder in ("large", *bundles.ADDED.values()):
        shutil.copytree(WEIGHTS / folder, weights / folder)
    before = expected_digests(export_plan(tmp_path / "out", weights))
    assert before == expected_digests(export_plan(tmp_path / "out"))
    for folder in ("one_step", "large"):
        path = weights / folder / "scheduler" / "scheduler_config.json"
        config = path.read_bytes()
        path.write_text(json.dumps({**json.loads(config), "timestep_spacing": "leading"}))
        after = expected_digests(export_plan(tmp_path / "out", weights))
        assert {name for name in after if after[name] != before[name]} == {"schedulers"}
        path.write_bytes(config)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_stands_in_the_way_in_words_of_the_demo(tmp_path, kind):
    out = tmp_path / "shapes-bundle"
    if kind == "file":
        out.touch()
    else:
        out.mkdir()
    with pytest.raises(ExportError, match=r"shapes-bundle: exists and is no bundle\. Remove it, or give another --out"):
        ensure_bundle(out)
    assert out.exists()
