"""Consecutive requests overlap: the pictures of calls, in order; errors, cancellation and laziness on the way."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import ArgumentError, ExecutionError, Pipeline, Request, RequestError, painting, traced
from tandemrt.runtime.overlap import overlapped
from tandemrt.runtime.stream import Events, Stage
from tandemrt.runtime.trace import Trace

from .test_concurrency import STEERED, TARGETS

JOBS: list[Mapping[str, Any]] = [{**job, "seed": seed, "output_type": "np"} for seed in (7, 8) for job in STEERED]


def tops(trace: Trace) -> dict[str, set[int]]:
    """The lanes of texts, rows and pictures."""
    lanes: dict[str, set[int]] = {}
    for event in trace.events:
        lanes.setdefault(event["cat"], set()).add(event["tid"])
    return lanes


@pytest.mark.parametrize("target", TARGETS)
def test_the_pictures_of_calls_in_order(control_bundle: Path, tmp_path: Path, target: str) -> None:
    with Pipeline.open(control_bundle, target, threads=1) as pipe:
        serial = [pipe(**job) for job in JOBS]
        with traced(tmp_path / "trace.json") as trace:
            mapped = list(pipe.map([Request(**JOBS[0]), *JOBS[1:]]))
    for one, other in zip(serial, mapped, strict=True):
        np.testing.assert_array_equal(np.stack(one.images), np.stack(other.images))
        assert one.seeds == other.seeds
    lanes = tops(trace)
    assert [len(lanes[part]) for part in ("text", "row", "decode")] == [1, 1, 1]
    assert len(lanes["text"] | lanes["row"] | lanes["decode"]) == 3


def test_parts_of_three_requests_overlap(control_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, rows and pictures of three requests wait for each other: they only meet if they run at once."""
    meeting, conditioned, open_loop = threading.Barrier(3, timeout=60), painting.conditioned, painting.open_loop
    decode = type(control_pipe._models).decode

    def meets(number: int, function: Any) -> Any:
        calls = iter(range(100))

        def met(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                meeting.wait()
            return function(*args, **kwargs)

        return met

    monkeypatch.setattr(painting, "conditioned", meets(2, conditioned))
    monkeypatch.setattr(painting, "open_loop", meets(1, open_loop))
    monkeypatch.setattr(type(control_pipe._models), "decode", meets(0, decode))
    assert len(list(control_pipe.map([{"prompt": "red", "num_inference_steps": 1}] * 3))) == 3


def test_requests_are_taken_when_there_is_room(control_pipe: Pipeline) -> None:
    taken = 0

    def endless() -> Iterator[Mapping[str, Any]]:
        nonlocal taken
        while True:
            taken += 1
            yield JOBS[0]

    outputs = control_pipe.map(endless())
    assert taken == 0
    for count in (1, 2, 3):
        next(outputs)
        assert taken == count + 2
    outputs.close()  # type: ignore[attr-defined]
    assert len(control_pipe("red", num_inference_steps=1).images) == 1


def test_an_error_comes_in_its_turn_and_leaves_the_pipeline_usable(control_pipe: Pipeline) -> None:
    bad = [{"prompt": "red", "height": 63}, {"prompt": "red", "latents": np.full((1, 4, 8, 8), 1e38, np.float32)}]
    for job, error in zip(bad, (RequestError, ExecutionError), strict=True):
        outputs = control_pipe.map([JOBS[0], JOBS[1], job, JOBS[2], JOBS[3]])
        made = [next(outputs), next(outputs)]
        with pytest.raises(error):
            next(outputs)
        with pytest.raises(StopIteration):
            next(outputs)
        for output, same in zip(made, JOBS, strict=False):
            np.testing.assert_array_equal(np.stack(output.images), np.stack(control_pipe(**same).images))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"prompt": "red", "sede": 7}, "unknown argument"),
        (None, "user's own"),
    ],
)
def test_a_request_that_cannot_be_made_comes_in_its_turn(
    control_pipe: Pipeline, bad: Mapping[str, Any] | None, error: str
) -> None:
    def requests() -> Iterator[Mapping[str, Any]]:
        yield from JOBS[:2]
        if bad is None:
            raise ValueError("the user's own")
        yield bad
        pytest.fail("a request was taken after one that cannot be made")

    outputs = control_pipe.map(requests())
    made = [next(outputs), next(outputs)]
    with pytest.raises(RequestError if bad else ValueError, match=error):
        next(outputs)
    with pytest.raises(StopIteration):
        next(outputs)
    for output, same in zip(made, JOBS, strict=False):
        np.testing.assert_array_equal(np.stack(output.images), np.stack(control_pipe(**same).images))


@pytest.mark.parametrize("part", ["check", "text", "rows", "pictures"])
def test_an_error_holds_nothing_of_what_ran(part: str) -> None:
    """The error itself, whose traceback holds all that ran, is gone while the one that is raised is held."""
    raised: list[weakref.ref[BaseException]] = []

    def fail(at: str) -> None:
        if at == part:
            error = ExecutionError("unet", "failed")
            raised.append(weakref.ref(error))
            try:
                raise error
            finally:
                del error

    def begin(_: threading.Event) -> Events:
        fail("check")
        return events()

    def events() -> Events:
        fail("text")
        yield Stage.ENCODED
        fail("rows")
        yield Stage.SAMPLED
        fail("pictures")
        raise AssertionError("does not fail")

    gc.disable()
    try:
        with pytest.raises(ExecutionError, match="unet: failed") as held:
            next(overlapped([begin]))
        assert [one() for one in raised] == [None]
        del held
    finally:
        gc.enable()


def test_what_has_not_begun_when_one_fails_never_does() -> None:
    """The first fails while the second waits to be cancelled, with the third behind it."""
    begun: list[str] = []

    def first(_: threading.Event) -> Events:
        begun.append("first")
        yield Stage.ENCODED
        while "second" not in begun:
            time.sleep(0.001)
        raise ExecutionError("unet", "failed")

    def second(cancelled: threading.Event) -> Events:
        begun.append("second")
        assert cancelled.wait(60)
        raise ExecutionError("generation", "cancelled")

    def third(_: threading.Event) -> Events:
        begun.append("third")
        raise ExecutionError("generation", "never begins")

    with pytest.raises(ExecutionError, match="unet: failed"):
        next(overlapped([first, second, third]))
    assert begun == ["first", "second"]


def test_what_is_put_aside_is_cancelled_and_not_waited_for() -> None:
    """As garbage it may be collected on a thread that holds a lock which the next request waits for."""
    lock, begun, ended = threading.Lock(), threading.Event(), threading.Event()

    def first(_: threading.Event) -> Events:
        yield Stage.ENCODED
        assert begun.wait(60)
        yield Stage.SAMPLED
        return None  # type: ignore[return-value]

    def second(cancelled: threading.Event) -> Events:
        begun.set()
        with lock:
            if cancelled.is_set():
                ended.set()
            raise ExecutionError("generation", "cancelled")
        yield Stage.ENCODED

    def third(_: threading.Event) -> Events:
        raise AssertionError("never begins")

    outputs = overlapped([first, second, third])
    with lock:
        next(outputs)
        closing = threading.Thread(target=outputs.close, daemon=True)  # type: ignore[attr-defined]
        closing.start()
        closing.join(60)
        waited = closing.is_alive()
    assert not waited
    assert ended.wait(60)


def test_closing_the_pipeline_cancels_what_is_under_way(control_pipe: Pipeline) -> None:
    outputs = control_pipe.map([JOBS[0], *[{"prompt": "red", "num_inference_steps": 999}] * 3])
    next(outputs)
    control_pipe.close()
    with pytest.raises(ExecutionError, match="was closed"):
        next(outputs)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("a blue square", r"requests\[1\]: request: of another type, got 'a blue square', expected a Request, or"),
        ({"promt": "red"}, r"requests\[1\]: promt: unknown argument"),
        ({"prompt": "red", "num_inference_steps": -1}, r"requests\[1\]: steps: unet: number of steps, got -1"),
    ],
)
def test_a_request_that_cannot_be_used_is_told_by_its_index(control_pipe: Pipeline, wrong: Any, told: str) -> None:
    outputs = control_pipe.map([JOBS[0], wrong, JOBS[1]])
    assert len(next(outputs).images) > 0
    with pytest.raises(ArgumentError, match=told):
        next(outputs)
    assert list(outputs) == []
