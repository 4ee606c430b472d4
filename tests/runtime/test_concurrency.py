"""One pipeline under many threads: the pictures of serial runs, whatever else fails, is cancelled, or closes it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tandemrt.runtime import CancelledError, ExecutionError, Pipeline, PlanError, sampler
from tandemrt.runtime.backends.onnxruntime import OnnxRuntimeBinding
from tandemrt.runtime.plan import Plan

from .tiny_families import write_tiny_control, write_tiny_sd3, write_tiny_sdxl

THREADS, HERE = 8, threading.local()
TARGETS = ("onnxruntime:cpu", "openvino:cpu")
Pixels = npt.NDArray[np.float32]
Job = Mapping[str, Any]


def picture(seed: int, height: int = 64, width: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# Sizes, plans, solvers, guidance, ControlNets and image-to-image, no two alike.
STEERED: tuple[Job, ...] = (
    {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}},
    {"prompt": "blue", "steps": {"unet_free": 2, "unet": 2}, "height": 96, "guidance_scale": 1.0},
    {"prompt": "red blue", "num_inference_steps": 4, "width": 128, "solver": "euler_a"},
    {"prompt": ["red", "blue red"], "num_inference_steps": 3, "guidance_interval": (0.3, 1.0)},
    {"prompt": "red", "num_inference_steps": 3, "control_image": {"canny": picture(1)}},
    {
        "prompt": "blue blue",
        "steps": {"unet": 2, "unet_second": 2},
        "control_image": {"canny": picture(1), "depth": picture(2)},
        "control_guidance_end": 0.5,
        "guidance_scale": 0.0,
    },
    {"prompt": "red", "num_inference_steps": 4, "image": picture(3), "strength": 0.5},
    {
        "prompt": "blue",
        "num_inference_steps": 4,
        "image": picture(4, 96, 64),
        "mask_image": picture(5, 96, 64)[..., 0],
        "solver": "dpmsolver++sde",
    },
)
WIDE: tuple[Job, ...] = (
    {"prompt": "red", "steps": {"unet": 2, "unet_small": 2}},
    {"prompt": "blue", "steps": {"unet_small": 3}, "height": 96, "guidance_scale": 1.0},
    {"prompt": ["red", "blue"], "steps": {"unet": 2}, "prompt_2": ["blue", "red red"], "negative_prompt": "red red"},
    {"prompt": "red blue", "steps": {"unet_small": 1, "unet": 2}, "width": 96},
)
FLOWING: tuple[Job, ...] = tuple(
    {**job, "steps": {name.replace("unet", "transformer"): count for name, count in job["steps"].items()}}
    for job in WIDE
)
FAMILIES = {
    "steered": (write_tiny_control, STEERED),
    "sdxl": (write_tiny_sdxl, WIDE),
    "sd3": (write_tiny_sd3, FLOWING),
}


def painted(pipe: Pipeline, job: Job, seed: int = 7) -> Pixels:
    return np.stack(pipe(**job, seed=seed, output_type="np").images)


def cancelled(pipe: Pipeline, job: Job) -> None:
    stream = pipe.stream(**job)
    next(stream)
    stream.cancel()
    with pytest.raises(CancelledError):
        stream.result()


def abandoned(pipe: Pipeline, job: Job) -> None:
    next(pipe.stream(**job))


def failed(pipe: Pipeline, job: Job) -> None:
    HERE.fails = True
    with pytest.raises(ExecutionError, match="fails here"):
        pipe(**job)
    HERE.fails = False


@pytest.fixture(autouse=True)
def failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thread says so, its rows fail after the second call of a model."""
    require_finite = sampler.require_finite

    def failing(plan: Plan, row: int, *rest: Any) -> None:
        if getattr(HERE, "fails", False) and row == 1:
            raise ExecutionError("denoiser", "fails here")
        require_finite(plan, row, *rest)

    monkeypatch.setattr(sampler, "require_finite", failing)


def refused(pipe: Pipeline, job: Job) -> None:
    with pytest.raises(PlanError):
        pipe(**{**job, "solver": "none"})


DISTURBANCES: tuple[Callable[[Pipeline, Job], None], ...] = (cancelled, abandoned, failed, refused)


def at_once(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return, eight at a time from the same moment on."""
    start = threading.Barrier(THREADS)

    def run(index: int) -> list[tuple[int, Any]]:
        start.wait()
        return [(at, tasks[at]()) for at in range(index, len(tasks), THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        done = dict(pair for pairs in pool.map(run, range(THREADS)) for pair in pairs)
    return [done[index] for index in range(len(tasks))]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_paint_what_serial_runs_paint(family: str, target: str, tmp_path: Path) -> None:
    write, jobs = FAMILIES[family]
    write(tmp_path / "bundle")
    with Pipeline.open(tmp_path / "bundle", target, threads=1) as pipe:
        serial = [painted(pipe, job, seed) for seed in (7, 8) for job in jobs]
    # A pipeline of its own, whose models are loaded by whoever comes first.
    with Pipeline.open(tmp_path / "bundle", target, threads=1) as pipe:
        paints = [lambda job=job, seed=seed: painted(pipe, job, seed) for seed in (7, 8) for job in jobs]
        upsets = [lambda upset=upset, job=job: upset(pipe, job) for upset in DISTURBANCES for job in jobs]
        mixed = at_once([task for pair in zip(paints * 2, upsets, strict=True) for task in pair])
        after = [painted(pipe, job) for job in jobs]
    for index, made in enumerate([*mixed[::2], *after]):
        np.testing.assert_array_equal(made, serial[index % len(serial)])
    assert len({made.tobytes() for made in serial}) == len(serial)


@pytest.mark.parametrize("target", TARGETS)
def test_closing_ends_what_runs(target: str, tmp_path: Path) -> None:
    write_tiny_control(tmp_path / "bundle")
    pipe = Pipeline.open(tmp_path / "bundle", target, threads=1)
    painted(pipe, STEERED[0])
    running = threading.Barrier(THREADS + 1)

    def endless(seed: int) -> str:
        stream = pipe.stream("red", seed=seed, num_inference_steps=999)
        next(stream)
        running.wait()
        with pytest.raises(CancelledError) as caught:
            stream.result()
        return str(caught.value)

    with ThreadPoolExecutor(THREADS) as pool:
        ends = [pool.submit(endless, seed) for seed in range(THREADS)]
        running.wait()
        pipe.close()
        messages = [end.result() for end in ends]
    assert all("the pipeline was closed" in message for message in messages)
    with pytest.raises(ExecutionError, match="used after it was closed") as caught:
        pipe("red")
    assert not isinstance(caught.value, CancelledError)


def test_closing_amid_a_run_of_a_model_is_a_cancellation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the models are when it is closed: in the text, a row, a picture in or out."""
    write_tiny_control(tmp_path / "bundle")
    run, runs, last = OnnxRuntimeBinding.run, 0, 0

    def closing(self: OnnxRuntimeBinding) -> None:
        nonlocal runs
        runs += 1
        if runs == last:
            pipe.close()
        run(self)

    monkeypatch.setattr(OnnxRuntimeBinding, "run", closing)
    job = {**STEERED[6], "num_inference_steps": 2, "control_image": {"depth": picture(2)}, "previews": 1}
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipe:
        pipe(**job)
    every, runs = runs, 0
    for last in range(1, every + 1):
        runs = 0
        with Pipeline.open(tmp_path / "bundle", threads=1) as pipe, pytest.raises(CancelledError, match="was closed"):
            pipe(**job)
        assert runs == last


def test_closing_frees_the_models(tmp_path: Path) -> None:
    write_tiny_control(tmp_path / "bundle")
    pipe = Pipeline.open(tmp_path / "bundle", threads=1)
    painted(pipe, STEERED[0])
    sessions = [weakref.ref(session) for session in pipe._models._sessions.values()]
    pipe.close()
    assert sessions
    assert not any(session() for session in sessions)
