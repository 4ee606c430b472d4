"""Engines of TensorRT's flavours on their own buffers: single runs, and many in a row, as CUDA graphs.

A run copies the inputs from pinned host arrays, runs the engine and copies the outputs back, all on one stream. What it
queues is recorded as a CUDA graph in the second run and launched as one from then on: the first run is left to what
TensorRT sets up late, TensorRT for RTX's compilation of kernels above all.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from ..errors import ExecutionError
from ..manifest import TensorSpec
from .base import Array, Binding, Handed, Shape
from .cuda import Device, Graph, Memory, Scratch, Stream, pinned


class Owner(Protocol):
    """What a binding knows of the session that it belongs to.

    device: the GPU that it is on. blocks: of scratch memory, for as many runs as may overlap by now. generation: counts
    the changes of its weights.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: Device
    blocks: Sequence[Scratch]
    generation: int

    def live(self) -> Any:
        """Raise ExecutionError when it is closed."""

    def failed(self, what: str) -> ExecutionError:
        """An error with what TensorRT said last."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a binding: its pinned host array and its place on the GPU."""

    host: Array
    memory: Memory


class TensorRtBinding:
    """An execution context with buffers on the host and the GPU; see `Binding`.

    `ready` while the context has run with the scratch memory and the weights that are in place. `left`: see `leave`.
    """

    def __init__(self, session: Owner, context: Any, profile: int, shapes: Mapping[str, Shape]) -> None:
        self.device, self._session, self._context = session.device, session, context
        self.block = session.blocks[0]
        self.stream = Stream(self.device)
        if not context.set_optimization_profile_async(profile, self.stream.handle):
            raise session.failed(f"profile {profile} is refused")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise session.failed(f"shape {shape} of input {name!r} is refused")
        self.given = {spec.name: self._tensor(spec.name, spec.dtype) for spec in session.inputs}
        self.made = {spec.name: self._tensor(spec.name, spec.dtype) for spec in session.outputs}
        self.inputs: Mapping[str, Array] = MappingProxyType({name: one.host for name, one in self.given.items()})
        self.outputs: Mapping[str, Array] = MappingProxyType({name: one.host for name, one in self.made.items()})
        self.scratch_bytes = int(context.update_device_memory_size_for_shapes())
        # Held weakly: a block that is too small for another engine is freed as soon as that one grows it.
        self.scratch: weakref.ref[Memory] | None = None
        self.ready = False
        self.generation = session.generation
        self._graph: Graph | None = None
        self.left: frozenset[str] = frozenset()
        self.stream.wait()  # for the profile: a chain runs on another binding's stream

    def __del__(self) -> None:
        """Destroy the context, and with it an engine that it alone keeps alive, with their GPU current."""
        with suppress(ExecutionError), self.device.current():
            self._context = None

    @property
    def blocks(self) -> Sequence[Scratch]:
        """The blocks of scratch memory of which a run takes one."""
        return self._session.blocks

    def run(self) -> None:
        """Run the model once; see `Binding.run`."""
        self.require_open()
        with self.device.current(), scratch_held([self]):
            if self._graph is None and self.ready:
                self._graph = self.stream.recorded(self._queue)
            if self._graph is None:
                self._queue()
            else:
                self._graph.launch(self.stream)
            self.stream.wait()
            self.ready = True

    def chain(self, runs: Sequence[tuple[Binding, Collection[str]]], carried: Mapping[str, str]) -> TensorRtChain:
        """Runs as one CUDA graph, such as all rows of a plan on its step engines; see `Chaining.chain`."""
        own = [(binding, given) for binding, given in runs if isinstance(binding, TensorRtBinding)]
        if len(own) != len(runs):
            raise ExecutionError("chain", "runs of several backends")
        return TensorRtChain(own, carried)

    def leave(self, names: Collection[str]) -> None:
        """Leave these tensors on the GPU; see `Handing.leave`."""
        if self.left != frozenset(names):
            self.left, self._graph = frozenset(names), None

    def take(self, handed: Iterable[Handed]) -> None:
        """Copy from GPU to GPU, or within one; see `Handing.take`."""
        with self.device.current():
            for one in handed:
                if not isinstance(one.giver, TensorRtBinding):
                    raise ExecutionError("bindings", f"{one.output!r} is of another backend")
                target, source = self.given[one.name], one.giver.made[one.output]
                size = min(target.host[one.at :].nbytes, source.host[one.first :].nbytes)
                begin, at = one.first * source.host[:1].nbytes, one.at * target.host[:1].nbytes
                self.stream.take(source.memory, target.memory, begin=begin, at=at, size=size)
            self.stream.wait()

    def read(self, name: str, entry: int | None = None) -> Array:
        """See `Handing.read`."""
        host, address = self._part(name, entry)
        with self.device.current():
            self.stream.download(address, host)
            self.stream.wait()
        return host

    def write(self, *names: str, entry: int | None = None) -> None:
        """See `Handing.write`."""
        with self.device.current():
            for name in names:
                self.stream.upload(*self._part(name, entry))
            self.stream.wait()

    def require_open(self) -> None:
        """Raise ExecutionError when the engine is closed."""
        self._session.live()

    def use_scratch(self, block: Scratch) -> None:
        """Point the context at a block, whose lock is held; what was recorded on another one is void."""
        self.block, scratch = block, block.reserved(self.scratch_bytes)
        if self.scratch is None or self.scratch() is not scratch:
            self._context.set_device_memory(scratch.address, scratch.size)
            self.scratch, self._graph, self.ready = weakref.ref(scratch), None, False
        if self.generation != self._session.generation:  # refitted: what was recorded may hold the weights before
            self.generation, self._graph, self.ready = self._session.generation, None, False

    def upload(self, stream: Stream) -> None:
        """Queue the copies of all inputs but those that are left on the GPU."""
        for name, one in self.given.items():
            if name not in self.left:
                stream.upload(one.host, one.memory.address)

    def enqueue(self, stream: Stream) -> None:
        """Queue the engine alone."""
        if not self._context.execute_async_v3(stream.handle):
            raise self._session.failed("the run cannot be queued")

    def download(self, stream: Stream) -> None:
        """Queue the copies of all outputs but those that are left on the GPU."""
        for name, one in self.made.items():
            if name not in self.left:
                stream.download(one.memory.address, one.host)

    def _queue(self) -> None:
        self.upload(self.stream)
        self.enqueue(self.stream)
        self.download(self.stream)

    def _part(self, name: str, entry: int | None) -> tuple[Array, int]:
        """A tensor's host array, or an entry's, and where that is on the GPU."""
        one = self.given[name] if name in self.given else self.made[name]
        if entry is None:
            return one.host, one.memory.address
        return one.host[entry], one.memory.address + entry * one.host[0].nbytes

    def _tensor(self, name: str, dtype: str) -> _Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=1) < 0:
            raise self._session.failed(f"the shape of {name!r} does not follow from the inputs'")
        host = pinned(self.device, shape, dtype)
        memory = Memory(self.device, host.nbytes)
        if not self._context.set_tensor_address(name, memory.address):
            raise self._session.failed(f"the buffer of {name!r} is refused")
        return _Tensor(host, memory)


class TensorRtChain:
    """Runs of bindings, one after another on the first one's stream, recorded as one CUDA graph; see `Chain`."""

    def __init__(self, runs: Sequence[tuple[TensorRtBinding, Collection[str]]], carried: Mapping[str, str]) -> None:
        self._runs = [binding for binding, _ in runs]
        self._bindings = list(dict.fromkeys(self._runs))
        self._carried = carried
        self.rows: Sequence[Mapping[str, Array]] = tuple(
            {name: pinned(binding.device, binding.inputs[name].shape, binding.inputs[name].dtype) for name in names}
            for binding, names in runs
        )
        self._graph: Graph | None = None
        self._recorded_on: Sequence[object] = ()

    def run(self) -> None:
        """Do all runs; see `Chain.run`."""
        for binding in self._bindings:
            binding.require_open()
        stream = self._runs[0].stream
        with self._runs[0].device.current(), scratch_held(self._bindings):
            on = [(binding.scratch, binding.generation, binding.left) for binding in self._bindings]
            if on != self._recorded_on:
                self._graph = None
            if self._graph is None and all(binding.ready for binding in self._bindings):
                self._graph, self._recorded_on = stream.recorded(self._queue), on
            if self._graph is None:
                self._queue()
            else:
                self._graph.launch(stream)
            stream.wait()
            for binding in self._bindings:
                binding.ready = True

    def _queue(self) -> None:
        stream = self._runs[0].stream
        for binding in self._bindings:
            binding.upload(stream)
        for index, (binding, row) in enumerate(zip(self._runs, self.rows, strict=True)):
            for name, values in row.items():
                stream.upload(values, binding.given[name].memory.address)
            for name, output in self._carried.items() if index else ():
                target, source = binding.given[name].memory, self._runs[index - 1].made[output].memory
                stream.move(source.address, target.address, target.size)
            binding.enqueue(stream)
        self._runs[-1].download(stream)


@contextmanager
def scratch_held(bindings: Sequence[TensorRtBinding]) -> Iterator[None]:
    """Hold a block of scratch memory for bindings that run one after another.

    That is the block of the last run where it is free, else another that is; where none is, the last run's is waited
    for. So runs that overlap part their blocks once, and keep them and what was recorded on them.
    """
    first = bindings[0]
    free = (one for one in (first.block, *first.blocks) if one.lock.acquire(blocking=False))
    block = next(free, None)
    if block is None:
        block = first.block
        block.lock.acquire()
    try:
        block.reserved(max(one.scratch_bytes for one in bindings))  # at once: growing moves it
        for one in bindings:
            one.use_scratch(block)
        yield
    except BaseException:
        with suppress(ExecutionError):
            first.stream.wait()  # what was queued before it failed still uses the block
        raise
    finally:
        block.lock.release()
