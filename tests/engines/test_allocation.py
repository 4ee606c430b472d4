"""Step engines allocate no arrays in rows after the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.runtime import Pipeline

from ..runtime.test_allocation import DRAWING_BYTES, OBJECTS_BYTES, ROWS, SIZE, TARGETS, WAYS, peaks_bytes, streamed
from ..runtime.tiny_families import write_tiny_control
from .test_sampling import build


@pytest.fixture(scope="module")
def control_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control") / "bundle"
    write_tiny_control(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", ["batched", "ControlNet", "noise", "hybrid"])
def test_rows_after_the_first_allocate_nothing(control_bundle: Path, tmp_path: Path, target: str, way: str) -> None:
    given = {"steps": {"unet": 3, "unet_second": 3}, "num_inference_steps": None} if way == "hybrid" else WAYS[way]
    names = ("unet", "unet_second") if way == "hybrid" else ("unet",)
    build(control_bundle, tmp_path, *names, target=target, profiles=(f"{SIZE}:guided",))
    with Pipeline.open(control_bundle, target, threads=1, cache=tmp_path) as pipe:
        stream = streamed(pipe, **given)
        peaks = peaks_bytes(stream)
        assert stream.result().timings.step_engines
    assert len(peaks) == ROWS - 1
    assert max(peaks) < (DRAWING_BYTES if way == "noise" else OBJECTS_BYTES)
