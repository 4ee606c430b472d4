"""One pipeline under eight threads with guidance placed in every way at once: the pictures of serial runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import CancelledError, Pipeline

from ..runtime.test_concurrency import Pixels, at_once
from .tandem import ROWS, WINDOW, build_stages

IN_WINDOW = {"num_inference_steps": ROWS, "placement": "hybridiff"}
JOBS: tuple[Mapping[str, Any], ...] = (
    {"steps": {"unet": 2, "unet_small": 2}},
    {"num_inference_steps": 4, "guidance": "adaptive", "guidance_config": {"threshold": 0.5}},
    {"steps": {"unet_small": 2, "unet": 2}, "placement": "parallel", "guidance_interval": (0.0, 0.6)},
    {**IN_WINDOW, "placement_config": WINDOW},
    {"num_inference_steps": 2, "placement": "sequential", "height": 96},
    {**IN_WINDOW, "placement_config": {**WINDOW, "stride": 2}},
    {"num_inference_steps": 3, "guidance": "adaptive", "placement": "parallel", "width": 96, "solver": "euler_a"},
    {"num_inference_steps": 2, "placement": "auto"},
)
Asked = dict[str, Any]


def called(pipe: Pipeline, asked: Asked) -> list[Pixels]:
    return [np.stack(pipe(**asked).images)]


def streamed(pipe: Pipeline, asked: Asked) -> list[Pixels]:
    stream = pipe.stream(**asked, previews=2)
    assert sum(bool(event.preview) for event in stream) == len(stream.result().timings.rows) // 2
    return [np.stack(stream.result().images)]


def mapped(pipe: Pipeline, asked: Asked) -> list[Pixels]:
    return [np.stack(output.images) for output in pipe.map([asked, asked])]


def cancelled(pipe: Pipeline, asked: Asked) -> list[Pixels]:
    stream = pipe.stream(**asked)
    next(stream)
    stream.cancel()
    with pytest.raises(CancelledError):
        stream.result()
    return []


def put_aside(pipe: Pipeline, asked: Asked) -> list[Pixels]:
    next(pipe.stream(**asked))
    next(pipe.map([asked] * 3))
    return []


WAYS: tuple[Callable[[Pipeline, Asked], list[Pixels]], ...] = (called, streamed, mapped, cancelled, put_aside)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_threads_paint_what_serial_runs_paint(target: str, shapes_bundle: Path, tmp_path: Path) -> None:
    build_stages(shapes_bundle, tmp_path, "unet", 2, target)
    every: list[Asked] = [{"prompt": "a red circle", "output_type": "np", "seed": 7, **job} for job in JOBS]
    with Pipeline.open(shapes_bundle, target, threads=2, cache=tmp_path) as pipe:
        serial = [np.stack(pipe(**asked).images) for asked in every]
    # Neighbours in the list run at once: each thread has another way, and each way meets every job.
    tasks = [(way, index) for index in range(len(every)) for way in WAYS]
    with Pipeline.open(shapes_bundle, target, threads=2, cache=tmp_path) as pipe:
        made = at_once([lambda way=way, index=index: way(pipe, dict(every[index])) for way, index in tasks])
    for (way, index), pictures in zip(tasks, made, strict=True):
        for picture in pictures:
            np.testing.assert_array_equal(picture, serial[index], err_msg=f"{way.__name__} {every[index]}")
    assert len({one.tobytes() for one in serial}) == len(serial)
