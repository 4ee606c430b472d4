"""Rows after the first allocate no arrays: buffers are bound once, and every result is written into one that is there.

Fresh noise is the exception: a solver that draws some makes it anew.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandemrt.runtime import Pipeline, Stream

from .test_concurrency import TARGETS, picture

SIZE = 512
LATENT_BYTES = 4 * 4 * (SIZE // 8) ** 2
ROWS = 6
# A row's Python objects, its event among them.
OBJECTS_BYTES = LATENT_BYTES // 4
WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "one branch": {"guidance_scale": 1.0},
    "sequential": {"placement": "sequential"},
    "parallel": {"placement": "parallel"},
    "two solver calls a step": {"solver": "heun"},
    "ControlNet": {"control_image": {"canny": picture(1, SIZE, SIZE)}},
    "image": {"image": picture(2, SIZE, SIZE), "strength": 1.0},
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
    assert max(peaks) < OBJECTS_BYTES


def test_adaptive_guidance_allocates_where_its_first_row_runs_one_branch(control_bundle: Path, pipe: Pipeline) -> None:
    """In a pipeline's first generation: the next one has the buffers of that."""
    way: dict[str, Any] = {"guidance": "adaptive", "guidance_config": {"threshold": 9.0, "steady": 99.0}}
    with Pipeline.open(control_bundle, str(pipe.target), threads=2) as fresh:
        stream = streamed(fresh, **way)
        second, third, *others = peaks_bytes(stream)
        assert [row.guided for row in stream.result().plan.ran] == [True] * 2 + [False] * 3 + [True]
        assert max(second, *others) < OBJECTS_BYTES < third
        assert max(peaks_bytes(streamed(fresh, **way))) < OBJECTS_BYTES


def test_an_allocation_would_be_seen(pipe: Pipeline) -> None:
    assert max(peaks_bytes(streamed(pipe, solver="euler_a"))) > LATENT_BYTES
