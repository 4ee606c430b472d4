"""What a split's chart shows, by the evidence that the documentation's is drawn from."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tandemrt.calibrate.split_report import drawn

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "bench" / "evidence" / "split.json").read_bytes())


def test_the_documentations_chart_is_of_the_evidence() -> None:
    assert (ROOT / "docs" / "split.svg").read_text(encoding="utf-8") == drawn(RESULT)


def test_the_plans_on_the_front_are_labelled_and_no_others() -> None:
    by_accuracy = drawn(RESULT).split("<svg ")[2]
    fronts = [point for point in RESULT["points"] if point["front"]]
    labels = re.findall(r">(\d+ unet|unet|unet_small)</text>", by_accuracy)
    assert len(set(labels)) == len(fronts) < len(RESULT["points"])  # each is drawn twice, first its outline
