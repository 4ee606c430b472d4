"""Step engines, and update engines, allocate no arrays in rows after the first ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.runtime import Pipeline
from tandemrt.runtime.variant import UPDATE

from ..runtime import stand_in_gpus
from ..runtime.test_allocation import DRAWING_BYTES, OBJECTS_BYTES, ROWS, SIZE, TARGETS, WAYS, peaks_bytes, streamed
from ..runtime.tiny_bundle import write_tiny_bundle
from ..runtime.tiny_families import write_tiny_control
from .on_gpus import TARGET, on_update_engines, written
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


@pytest.mark.parametrize("way", ["batched", "noise"])
@pytest.mark.parametrize("placement", ["batched", "sequential", "parallel"])
def test_rows_on_update_engines_allocate_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, way: str
) -> None:
    stand_in_gpus.stand_in(monkeypatch, "sm89")
    # The stand-ins' own models allocate: after the first row what they made then stands where it is.
    run, still = stand_in_gpus._Context._run, list[bool]()
    monkeypatch.setattr(stand_in_gpus._Context, "_run", lambda context: None if still else run(context))
    folder = written(tmp_path, write_tiny_bundle, {"unet": (UPDATE,)})
    with Pipeline.open(folder / "bundle", TARGET, cache=folder / "cache", threads=2) as pipe:
        stream = streamed(pipe, **{**WAYS[way], "placement": placement})
        next(stream)
        still.append(True)
        peaks = peaks_bytes(stream)
        assert on_update_engines(stream.result())
    assert len(peaks) == ROWS - 2
    assert max(peaks) < (DRAWING_BYTES if way == "noise" else OBJECTS_BYTES)
