"""What generations leave for the next ones: as much as they use at once, and nothing when they fail."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import ExecutionError, Pipeline
from tandemrt.runtime.backends.onnxruntime import OnnxRuntimeBinding, OnnxRuntimeSession
from tandemrt.runtime.pool import GENERATIONS, THINGS, Pool

from .tiny_bundle import write_tiny_bundle

HYBRID: dict[str, Any] = {"prompt": "red blue", "steps": {"unet": 2, "unet_small": 2}, "output_type": "np"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, "onnxruntime:cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[OnnxRuntimeBinding]]:
    """Every binding that is made, held weakly."""
    made: list[weakref.ref[OnnxRuntimeBinding]] = []
    bind = OnnxRuntimeSession.bind

    def binding(self: OnnxRuntimeSession, shapes: Any) -> OnnxRuntimeBinding:
        one = bind(self, shapes)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(OnnxRuntimeSession, "bind", binding)
    return made


def test_a_second_request_of_the_same_shapes_binds_nothing(pipe: Pipeline, bound: list[Any]) -> None:
    first = pipe(**HYBRID, seed=1)
    made = len(bound)
    assert made >= 3
    again = pipe(**HYBRID, seed=1)
    assert len(bound) == made
    np.testing.assert_array_equal(again.latents, first.latents)
    pipe(**HYBRID, height=96)
    assert len(bound) > made


def test_previews_share_their_decoders_buffers(pipe: Pipeline, bound: list[Any]) -> None:
    pipe(**HYBRID, seed=1)
    made = len(bound)
    previewed = pipe.stream(**HYBRID, seed=1, previews=1)
    assert all(event.preview for event in previewed)
    assert len(bound) <= made + 1  # another decoder's, at most


def test_threads_find_what_threads_left(pipe: Pipeline, bound: list[Any]) -> None:
    for _ in range(2):
        with ThreadPoolExecutor(GENERATIONS) as threads:
            list(threads.map(lambda seed: pipe(**HYBRID, seed=seed), range(4 * GENERATIONS)))
    one = 3 + 1  # two denoisers and a decoder; a text encoder has its own, bound once
    assert len(bound) <= GENERATIONS * one


def mapped(pipe: Pipeline) -> Callable[[], object]:
    """The first of four fails; the second then has its texts, and others wait for their turn."""
    outputs = pipe.map([HYBRID] * 4)
    return lambda: next(outputs)


@pytest.mark.parametrize(
    "way",
    [lambda pipe: lambda: pipe(**HYBRID), lambda pipe: pipe.stream(**HYBRID).result, mapped],
    ids=["call", "stream", "map"],
)
def test_what_a_failure_leaves_is_freed_at_once(
    pipe: Pipeline,
    bound: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[Pipeline], Callable[[], object]],
) -> None:
    run, runs = OnnxRuntimeBinding.run, iter(range(100))
    failed: list[weakref.ref[Any]] = []

    def failing(self: OnnxRuntimeBinding) -> None:
        run(self)
        if "sample" in self.inputs and next(runs) >= 1:  # also of the next one, which may come to run before it is told
            failed.append(weakref.ref(self))
            raise ExecutionError("unet", "failed")

    monkeypatch.setattr(OnnxRuntimeBinding, "run", failing)
    pipe.stream(**HYBRID).cancel()  # loads what a request needs
    gc.collect()
    gc.disable()
    try:
        result = way(pipe)
        with pytest.raises(ExecutionError, match="unet: failed") as raised:
            result()
        del raised
        assert failed
        assert [one for one in bound if one() is not None and "sample" in one().inputs] == []
        assert pipe._turns._running == []
    finally:
        gc.enable()


def test_a_stream_that_failed_fails_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: OnnxRuntimeBinding) -> None:
        raise ExecutionError("unet", "failed")

    monkeypatch.setattr(OnnxRuntimeBinding, "run", failing)
    stream = pipe.stream(**HYBRID)
    for _ in range(2):
        with pytest.raises(ExecutionError, match="unet: failed"):
            stream.result()


class Session:
    """A session whose bindings cannot be made while others hold the memory."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Any]] = []

    def bind(self, shapes: Any) -> Any:
        if sum(one() is not None for one in self.alive) >= 2:
            raise ExecutionError("CUDA", "cudaMalloc failed (out of memory)")
        binding = OnnxRuntimeBinding.__new__(OnnxRuntimeBinding)
        binding.inputs, binding.outputs = {}, {}
        self.alive.append(weakref.ref(binding))
        return binding


def test_memory_that_is_kept_is_given_up_before_a_binding_fails() -> None:
    pool, session = Pool(), Session()
    for size in range(5):
        with pool.lease() as lease:
            lease.bind(session, {"sample": (size,)})  # type: ignore[arg-type]
    lease = pool.lease()
    for size in (7, 8):
        lease.bind(session, {"sample": (size,)})  # type: ignore[arg-type]
    with pytest.raises(ExecutionError, match="out of memory"):
        lease.bind(session, {"sample": (9,)})  # type: ignore[arg-type]


def test_as_much_is_kept_as_generations_use_at_once() -> None:
    pool = Pool()
    leases = [pool.lease() for _ in range(GENERATIONS + 2)]
    for index, lease in enumerate(leases):
        for key in range(THINGS + 2):
            lease.take((index, key), object)
    for lease in leases:
        lease.__exit__(None, None, None)
    assert [len(left) for left in pool._left] == [THINGS] * GENERATIONS
    assert pool._left[-1][-1][0] == (GENERATIONS + 1, THINGS + 1)
    pool.close()
    with pool.lease() as lease:
        lease.take("late", object)
    assert pool._left == []


def test_a_stream_that_is_collected_as_garbage_may_give_back_at_any_moment(pipe: Pipeline) -> None:
    """Also to a pool that the collecting thread is looking through: it does not wait for itself."""

    class Collecting:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return gc.collect() < 0

    pipe(**HYBRID)
    gc.disable()
    try:
        stream = pipe.stream(**HYBRID)
        next(stream)
        put_aside = weakref.ref(stream)
        cycle = [stream]
        cycle.append(cycle)  # type: ignore[arg-type]
        del stream, cycle
        pool, pipe._pool = pipe._pool, Pool()  # the pipeline's closing need not wait for one that is stuck
        pool.keep([("left", object())])
        looking = threading.Thread(target=pool.adopt, args=(Collecting(),), daemon=True)
        looking.start()
        looking.join(60)
        assert not looking.is_alive()
        assert put_aside() is None
    finally:
        gc.enable()
