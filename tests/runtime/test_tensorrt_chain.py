"""Runs of TensorRT bindings as one CUDA graph, on a stand-in for CUDA that copies, records and launches on the host."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import ExecutionError
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.backends.base import Chaining, Handed
from tandemrt.runtime.backends.tensorrt_binding import TensorRtBinding
from tandemrt.runtime.manifest import TensorSpec

from .stand_in_gpus import Gpus

SHAPE = (2, 3)
SPECS = {name: TensorSpec(name=name, dtype="float32", shape=SHAPE) for name in ("state", "row", "whole", "next")}


class Context:
    """Stands for an execution context: next = factor · state + row + whole."""

    def __init__(self, gpu: Gpus, factor: float, wants: int) -> None:
        self._gpu, self._factor, self._wants = gpu, factor, wants
        self._arrays: dict[str, Any] = {}
        self._profiled = False

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return SHAPE

    def update_device_memory_size_for_shapes(self) -> int:
        return self._wants

    def set_tensor_address(self, name: str, address: int) -> bool:
        block = (ctypes.c_float * 6).from_address(address)
        self._arrays[name] = np.frombuffer(block, np.float32).reshape(SHAPE)
        return True

    def set_optimization_profile_async(self, _: int, stream: int) -> bool:
        self._gpu.queue("set_optimization_profile_async", stream, self._take_profile)
        return True

    def _take_profile(self) -> None:
        self._profiled = True

    def execute_async_v3(self, stream: int) -> bool:
        self._gpu.queue("execute_async_v3", stream, self._run)
        return True

    def _run(self) -> None:
        assert self._profiled
        arrays = self._arrays
        arrays["next"][...] = self._factor * arrays["state"] + arrays["row"] + arrays["whole"]

    def __getattr__(self, name: str) -> Any:
        return lambda *_: True


class Bindings:
    """Two engines' bindings on a GPU, of whose session all but the weights' generation is silent."""

    def __init__(self) -> None:
        self.gpu = Gpus(["sm89"])
        specs = tuple(SPECS.values())
        self.session: Any = SimpleNamespace(
            device=cuda.Device(self.gpu.runtime), inputs=specs[:3], outputs=specs[3:], generation=0, live=lambda: None
        )
        self.session.blocks = self.session.device.blocks(1)
        shapes = dict.fromkeys(("state", "row", "whole"), SHAPE)
        self.large, self.small = (
            TensorRtBinding(self.session, Context(self.gpu, factor, wants), 0, shapes)
            for factor, wants in ((2.0, 10), (-3.0, 100))
        )

    def chain(self) -> Any:
        """Two rows on the large engine, one on the small one; what is carried is the state."""
        runs = [(self.large, {"row"}), (self.large, {"row"}), (self.small, {"row"})]
        return self.large.chain(runs, {"state": "next"})

    def ran(self, chain: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """What a chain makes of random inputs, and what is to be expected."""
        random = np.random.default_rng(seed)
        for binding in (self.large, self.small):
            binding.inputs["whole"][...] = random.standard_normal(SHAPE)
        state = self.large.inputs["state"]
        state[...] = random.standard_normal(SHAPE)
        for row in chain.rows:
            row["row"][...] = random.standard_normal(SHAPE)
        expected = np.array(state)
        for factor, binding, row in zip(
            (2.0, 2.0, -3.0), (self.large, self.large, self.small), chain.rows, strict=True
        ):
            expected = np.float32(factor) * expected + row["row"] + binding.inputs["whole"]
        chain.run()
        return np.array(self.small.outputs["next"]), expected


def test_rows_carry_their_state_from_engine_to_engine_without_leaving_the_gpu() -> None:
    two = Bindings()
    assert isinstance(two.large, Chaining)
    chain = two.chain()
    for seed in range(4):
        two.gpu.copies.clear()
        np.testing.assert_array_equal(*two.ran(chain, seed))
        # Every input once, what each row is given, the state from row to row, the result.
        inputs, rows = ["HostToDevice"] * 6, ["HostToDevice"] + ["HostToDevice", "DeviceToDevice"] * 2
        assert [kind for kind, _ in two.gpu.copies] == [*inputs, *rows, "DeviceToHost"]
    assert two.gpu.wrong == []
    assert (two.gpu.recorded, two.gpu.launched) == (1, 3)  # the first run is not recorded


@pytest.mark.parametrize("change", ["scratch", "weights"])
def test_what_was_recorded_on_other_memory_or_weights_is_recorded_anew(change: str) -> None:
    two = Bindings()
    chain = two.chain()
    for seed in range(2):
        two.ran(chain, seed)
    assert two.gpu.recorded == 1
    if change == "scratch":
        two.session.device.blocks(1)[0].reserved(1000)
    else:
        two.session.generation += 1
    for seed in range(3):
        np.testing.assert_array_equal(*two.ran(chain, seed))
    assert two.gpu.recorded == 2


def test_a_binding_runs_by_itself_beside_a_chain_of_it() -> None:
    two = Bindings()
    chain = two.chain()
    for seed in range(3):
        np.testing.assert_array_equal(*two.ran(chain, seed))
        alone = two.small
        alone.run()
        expected = np.float32(-3) * alone.inputs["state"] + alone.inputs["row"] + alone.inputs["whole"]
        np.testing.assert_array_equal(alone.outputs["next"], expected)


def test_what_is_taken_and_written_is_what_there_is_at_that_time() -> None:
    two = Bindings()
    two.small.leave(["state", "whole"])
    state, whole = two.large.inputs["state"], two.small.inputs["whole"]
    state[...], whole[...] = 1, 10
    two.large.run()
    two.small.write("whole")
    whole[...] = 1000
    two.small.take([Handed("state", two.large, "next")])
    state[...] = 100
    two.large.run()
    two.small.run()
    np.testing.assert_array_equal(two.small.outputs["next"], np.full(SHAPE, -3 * 2 + 10))
    assert two.gpu.wrong == []


def test_runs_of_another_backend_are_refused() -> None:
    two = Bindings()
    other: Any = SimpleNamespace(inputs={}, outputs={}, run=lambda: None)
    with pytest.raises(ExecutionError, match="runs of several backends"):
        two.large.chain([(two.large, {"row"}), (other, {"row"})], {})


def test_a_run_that_fails_half_queued_is_waited_for_before_its_memory_serves_another() -> None:
    two = Bindings()
    chain, waited = two.chain(), list[bool]()
    lock = two.session.device.blocks(1)[0].lock
    two.small.stream.wait = two.large.stream.wait = lambda: waited.append(lock.locked())  # type: ignore[method-assign]
    two.small._context.execute_async_v3 = lambda _: False
    two.session.failed = lambda what: ExecutionError("unet", what)
    with pytest.raises(ExecutionError, match="the run cannot be queued"):
        two.ran(chain, 0)
    assert waited == [True]
    assert not lock.locked()
