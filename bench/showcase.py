"""The demo's work: paint held-out prompts in a few ways, score and time them, lay out the contact sheet."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tandemrt.runtime import Pipeline

from .contact_sheet import SheetColumn, contact_sheet
from .demo import SHEET_ROWS, TITLE
from .shapes.accuracy import (
    SCENES_SEED,
    WAYS,
    Pixels,
    Progress,
    Way,
    generate,
    paint,
    score_pictures,
    size_of,
)
from .shapes.checker import check
from .shapes.scenes import Scene, scenes

SUBTITLE = "Prompts that no model was trained on; every row starts from the same noise."
# Which ways of `accuracy.WAYS` are painted, and what they mean.
COLUMNS = {
    "25/0": "the large model alone",
    "10/15": "10 steps large, 15 small",
    "0/25": "the small model alone",
    "one step": "the one-step model",
}


def sheet_rows(scenes: Sequence[Scene]) -> list[int]:
    """Which scenes the sheet shows: the first two of one item and the first four of two, as far as there are such."""
    chosen: list[int] = []
    for items, count in ((1, 2), (2, 4)):
        chosen += [index for index, scene in enumerate(scenes) if len(scene.items) == items][:count]
    others = [index for index in range(len(scenes)) if index not in chosen]
    return (chosen + others)[:SHEET_ROWS]


def paint_and_score(bundle: Path, prompts: int, progress: Progress) -> tuple[list[dict[str, Any]], Image.Image]:
    """The table's rows and the contact sheet."""
    chosen = scenes(SCENES_SEED, prompts, "held_out")
    captions = [scene.caption for scene in chosen]
    shown = sheet_rows(chosen)
    ways = [way for way in WAYS if way.name in COLUMNS]
    rows, columns = [], []
    with Pipeline.open(bundle) as pipeline:
        times_ms = _picture_times_ms(pipeline, ways, [(captions[index], index) for index in shown], progress)
        for way in ways:
            pictures = paint(pipeline, way, captions, progress=progress)
            rows.append(
                {
                    "name": way.name,
                    "meaning": COLUMNS[way.name],
                    "median_ms": statistics.median(times_ms[way.name]),
                    "times_ms": times_ms[way.name],
                    **score_pictures(pictures, chosen).facts(),
                    **size_of(pipeline.bundle.manifest, way.denoisers),
                }
            )
            columns.append(_sheet_column(rows[-1], [(pictures[index], chosen[index]) for index in shown]))
    return rows, contact_sheet(TITLE, SUBTITLE, [captions[index] for index in shown], columns)


def _picture_times_ms(
    pipeline: Pipeline, ways: Sequence[Way], requests: Sequence[tuple[str, int]], progress: Progress
) -> dict[str, list[float]]:
    """Milliseconds of single pictures, the ways in turns; a first one of each, which loads the models, is left out."""
    times_ms: dict[str, list[float]] = {way.name: [] for way in ways}
    for done, (prompt, seed) in enumerate([requests[0], *requests]):
        for way in ways:
            output = generate(pipeline, way, [prompt], [seed])
            if done:
                times_ms[way.name].append(output.timings.total_ms)
        progress("timing single pictures", done, len(requests))
    return times_ms


def _sheet_column(row: Mapping[str, Any], pictures: Sequence[tuple[Pixels, Scene]]) -> SheetColumn:
    details = (row["meaning"], f"{row['median_ms']:.0f} ms, {row['all_right']['share']:.0%} right")
    right = tuple(check(picture, scene).all_right for picture, scene in pictures)
    return SheetColumn(row["name"], details, tuple(picture for picture, _ in pictures), right)
