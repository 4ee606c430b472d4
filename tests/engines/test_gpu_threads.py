"""One pipeline under eight threads on step engines and update engines, on stand-ins for GPUs: the serial pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Output, Pipeline
from tandemrt.runtime.variant import UPDATE, Variant

from ..runtime.stand_in_gpus import stand_in
from ..runtime.test_concurrency import at_once
from ..runtime.tiny_bundle import write_tiny_bundle
from .on_gpus import ASKED, SIDE, TARGET, on_update_engines, written

VARIANTS = (Variant(step="guided"), Variant(step="unguided"), UPDATE)
ADAPTIVE: dict[str, Any] = {"guidance": "adaptive", "guidance_config": {"threshold": 10.0, "steady": 1e6, "probe": 3}}
# Neighbours run at once.
JOBS: tuple[dict[str, Any], ...] = tuple(
    {**job, "placement": placement}
    for job in (
        {"steps": {"unet": 2, "unet_small": 2}},
        {"steps": {"unet": 4}, "height": 6 * SIDE, **ADAPTIVE},
        {"steps": {"unet_small": 3}, "width": 12 * SIDE, "solver": "euler_a", "prompt": "blue red"},
        {"steps": {"unet_small": 2, "unet": 3}, "guidance_interval": (0.0, 0.5), "solver": "unipc"},
        {"steps": {"unet": 2}, "num_images_per_prompt": 2, "height": 6 * SIDE},
        {"steps": {"unet": 3, "unet_small": 3}, "solver": "unipc", **ADAPTIVE},
    )
    for placement in ("batched", "sequential", "parallel")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engines = dict.fromkeys(("unet", "unet_small"), VARIANTS)
    return written(tmp_path_factory.mktemp("engines"), write_tiny_bundle, engines)


@pytest.mark.parametrize("devices", [None, (0, 1)], ids=["one", "two"])
def test_threads_paint_what_serial_runs_paint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...] | None
) -> None:
    gpus = stand_in(monkeypatch, "sm89", "sm89")

    def opened() -> Pipeline:
        return Pipeline.open(folder / "bundle", TARGET, cache=folder / "cache", threads=2, devices=devices)

    def paint(pipe: Pipeline, job: dict[str, Any]) -> Output:
        return pipe(**{**ASKED, **job})

    with opened() as pipe:
        serial = [paint(pipe, job) for job in JOBS]
    with opened() as pipe:
        together = at_once([lambda job=job: paint(pipe, job) for job in JOBS * 2])
    for index, made in enumerate(together):
        expected = serial[index % len(serial)]
        np.testing.assert_array_equal(made.latents, expected.latents, err_msg=str(JOBS[index % len(serial)]))
        np.testing.assert_array_equal(np.stack(made.images), np.stack(expected.images))
    assert {(out.timings.step_engines, on_update_engines(out)) for out in serial} == {(True, False), (False, True)}
    assert len({out.latents.tobytes() for out in serial[::3]}) == len(serial) // 3
    assert gpus.wrong == []
