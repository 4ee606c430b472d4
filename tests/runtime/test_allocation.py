"""Rows after the first allocate no arrays: buffers are bound once, and every result is written into one that is there.

Fresh noise is drawn into one too, through working memory that does not grow with the picture.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Pipeline, Stream
from tandemrt.runtime.noise import Noise
from tandemrt.runtime.trace import Trace

from .test_concurrency import TARGETS, picture

SIZE = 512
LATENT_BYTES = 4 * 4 * (SIZE // 8) ** 2
ROWS = 6
# A row's Python objects, its event among them.
OBJECTS_BYTES = LATENT_BYTES // 4
# Of a generator: the random words of a part of the noise.
DRAWING_BYTES = LATENT_BYTES // 2 + OBJECTS_BYTES
WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "one branch": {"guidance_scale": 1.0},
    "sequential": {"placement": "sequential"},
    "parallel": {"placement": "parallel"},
    "two solver calls a step": {"solver": "heun"},
    "ControlNet": {"control_image": {"canny": picture(1, SIZE, SIZE)}},
    "image": {"image": picture(2, SIZE, SIZE), "strength": 1.0},
    "noise": {"solver": "euler_a"},
    "noise of two seeds": {"solver": "euler_a", "num_images_per_prompt": 2, "seed": [7, 8]},
    "noise of a GPU's": {"solver": "euler_a", "seed_device": "cuda"},
    "mask": {"image": picture(2, SIZE, SIZE), "mask_image": picture(3, SIZE, SIZE)[..., 0]},
}


def peaks_bytes(stream: Stream) -> list[int]:
    """How much more memory than before each row after the first held at its peak."""
    next(stream)
    peaks = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in stream:
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return peaks


@pytest.fixture(scope="module", params=TARGETS)
def pipe(control_bundle: Path, request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.open(control_bundle, request.param, threads=2) as pipeline:
        yield pipeline


def streamed(pipe: Pipeline, **way: Any) -> Stream:
    size: dict[str, Any] = {"height": SIZE, "width": SIZE, "output_type": "latent"}
    return pipe.stream("red", **{"num_inference_steps": ROWS, "seed": 7, **size, **way})


@pytest.mark.parametrize("way", WAYS)
def test_rows_after_the_first_allocate_nothing(pipe: Pipeline, way: str) -> None:
    peaks = peaks_bytes(streamed(pipe, **WAYS[way]))
    assert len(peaks) >= ROWS - 1
    assert max(peaks) < (DRAWING_BYTES if way.startswith("noise") else OBJECTS_BYTES)


def test_adaptive_guidance_has_both_kinds_of_rows_bound(control_bundle: Path, pipe: Pipeline) -> None:
    """In a pipeline's first generation too, which finds nothing that another one left."""
    way: dict[str, Any] = {"guidance": "adaptive", "guidance_config": {"threshold": 9.0, "steady": 99.0}}
    with Pipeline.open(control_bundle, str(pipe.target), threads=2) as fresh:
        stream = streamed(fresh, **way)
        assert max(peaks_bytes(stream)) < OBJECTS_BYTES
        assert [row.guided for row in stream.result().plan.ran] == [True] * 2 + [False] * 3 + [True]


@pytest.mark.parametrize("placement", ["batched", "sequential", "parallel"])
def test_all_that_the_rows_need_is_bound_before_the_first(control_bundle: Path, pipe: Pipeline, placement: str) -> None:
    """In a pipeline's first generation: a hybrid's second denoiser, the end of guidance, a ControlNet that is late."""
    way: dict[str, Any] = {
        "steps": {"unet": 3, "unet_second": 3},
        "num_inference_steps": None,
        "guidance_interval": (0.0, 0.7),
        "control_image": {"canny": picture(1, SIZE, SIZE)},
        "control_guidance_start": 0.4,
        "placement": placement,
    }
    trace = Trace()
    with Pipeline.open(control_bundle, str(pipe.target), threads=2) as fresh, trace.recording():
        assert max(peaks_bytes(streamed(fresh, **way))) < OBJECTS_BYTES
    names = [event["name"] for event in trace.facts()["traceEvents"]]
    first = names.index("row 0")
    bound = [name for name in names[:first] if name.startswith("bind ") and "encoder" not in name]
    assert set(bound) == {"bind unet", "bind unet_second", "bind controlnet_canny"}
    assert not [name for name in names[first:] if name.startswith("bind ") and "decoder" not in name]


def test_an_allocation_would_be_seen(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "fill", lambda noise, out: np.copyto(out, noise.draw()))
    monkeypatch.setattr(Noise, "draw", lambda noise: noise._generators[0].randn(noise.shape))
    assert max(peaks_bytes(streamed(pipe, solver="euler_a"))) > LATENT_BYTES
