"""TensorRT and TensorRT for RTX, which share their interface: engines run on own buffers, as CUDA graphs.

A run copies the inputs from pinned host arrays, runs the engine and copies the outputs back, all on one stream. What it
queues is recorded as a CUDA graph in the binding's second run and launched as one from then on: the first run is left
to what TensorRT sets up late, TensorRT for RTX's compilation of kernels above all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..engine_files import REFIT, VERSION_COMPATIBLE, Engine
from ..engine_search import profile_for
from ..errors import EngineError, ExecutionError
from ..files import write_whole
from .base import Array, Shape
from .buffers import one_line, require_numpy_types, symbol_sizes
from .cuda import Device, Graph, Memory, Scratch, Stream, device, pinned
from .modules import imported
from .refit import Refit

_KEPT_MESSAGES = 4


class TensorRtSession:
    """An engine on the first GPU; see `Session`. Every binding has an execution context, which serves one thread."""

    def __init__(self, folder: Path, engine: Engine, streams: int = 1) -> None:
        """Load the engine in `folder`, its files proved by the caller to be those that `engine` lists.

        streams: how many runs may overlap, of this engine and of others: each takes one of so many blocks of scratch
            memory.

        Raises:
            TargetError: there is no GPU, or the flavour of TensorRT is not installed.
            EngineError: TensorRT refuses the engine.
        """
        self._name, self._engine = engine.component, engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        require_numpy_types(self._name, (*self.inputs, *self.outputs))
        self._device = device()
        self._scratches = self._device.blocks(streams)
        trt = imported(engine.ingredients.backend)
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)
        self._loaded: Any = _deserialized(self._runtime, folder, engine, self._log)
        self._kernels = _Kernels(trt, self._loaded, folder / f"kernels-{self._device.architecture}.bin")
        self._refit = Refit(trt, self._log, self._name)
        self.generation = 0  # of the weights

    def bind(self, input_shapes: Mapping[str, Shape]) -> TensorRtBinding:
        """Allocate buffers for these input shapes; see `Session.bind`."""
        engine = self.live()
        symbol_sizes(self._name, self.inputs, input_shapes)
        profile = profile_for(self._engine, input_shapes)
        if profile is None:
            raise ExecutionError(
                self._name, "no profile of the engine takes these shapes", got=dict(input_shapes),
                remedy="Build an engine with a --profile for this size and number of pictures."
            )  # fmt: skip
        context = self._kernels.context(engine)
        if context is None:
            raise self.failed("an execution context cannot be made")
        return TensorRtBinding(self, context, profile, input_shapes, self._scratches)

    def refit(self, base: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """Compute with the base's weights and, added to those that `changes` names, what it says; with none, the base.

        Every weight is made from the base's anew, so that neither changes nor their roundings add up. No binding runs
        meanwhile.

        base: the weights of the graph that was built, by name, float32 or float16; few are asked for. changes: float32,
            of the same shapes.

        Raises:
            EngineError: the engine was not built with --refit, or has no such weights.
            ExecutionError: a shape is another, TensorRT failed, or the session is closed.
        """
        engine = self.live()
        if REFIT not in self._engine.ingredients.flags:
            raise EngineError(self._name, "cannot be refitted", remedy="Build it with `tandemrt build-engine --refit`.")
        with ExitStack() as stack:
            for scratch in self._scratches:
                stack.enter_context(scratch.lock)
            self.generation += 1
            self._refit.apply(engine, base, changes)

    def close(self) -> None:
        """Free the engine; a second call does nothing. The kernels it compiled are kept for the next time."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._kernels.save()
            del loaded  # the kernels are the engine's, which goes after they are saved

    def live(self) -> Any:
        """TensorRT's engine; raises ExecutionError when the session is closed."""
        engine = self._loaded
        if engine is None:
            raise ExecutionError(self._name, "the model is closed", remedy="Open it again.")
        return engine

    def failed(self, what: str) -> ExecutionError:
        """An error of that kind with what TensorRT said last."""
        said = "; ".join(one_line(message) for message in self._log.messages) or "it did not say why"
        return ExecutionError(self._name, f"TensorRT failed: {what} ({said[:1000]})")

    @property
    def device(self) -> Device:
        return self._device


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a binding: its pinned host array and its place on the GPU."""

    host: Array
    memory: Memory


class TensorRtBinding:
    """An execution context with buffers on the host and the GPU; see `Binding`."""

    def __init__(
        self,
        session: TensorRtSession,
        context: Any,
        profile: int,
        shapes: Mapping[str, Shape],
        blocks: Sequence[Scratch],
    ) -> None:
        self._session, self._context, self._device = session, context, session.device
        self._blocks, self._block = blocks, blocks[0]
        self._stream = Stream(self._device)
        if not context.set_optimization_profile_async(profile, self._stream.handle):
            raise session.failed(f"profile {profile} is refused")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise session.failed(f"shape {shape} of input {name!r} is refused")
        self._given = {spec.name: self._tensor(spec.name, spec.dtype) for spec in session.inputs}
        self._made = {spec.name: self._tensor(spec.name, spec.dtype) for spec in session.outputs}
        self.inputs: Mapping[str, Array] = MappingProxyType({name: one.host for name, one in self._given.items()})
        self.outputs: Mapping[str, Array] = MappingProxyType({name: one.host for name, one in self._made.items()})
        self._scratch_bytes = int(context.update_device_memory_size_for_shapes())
        # Held weakly: a block that is too small for another engine is freed as soon as that one grows it.
        self._scratch: weakref.ref[Memory] | None = None
        self._runs = 0
        self._graph: Graph | None = None
        self.generation = session.generation

    def run(self) -> None:
        """Run the model once; see `Binding.run`."""
        self._session.live()
        with self.scratch_held():
            # Recorded once everything is set up and compiled.
            if self._graph is None and self._runs == 1:
                self._graph = self._stream.recorded(self._queue)
            if self._graph is None:
                self._queue()
            else:
                self._graph.launch(self._stream)
            self._stream.wait()
            self._runs += 1

    def chain(self, rows: Sequence[Mapping[str, Array]], carried: Mapping[str, str]) -> Chain:
        """Runs one after another, recorded as one graph: `rows` are the inputs that each is given anew.

        carried: by input, the output of the run before that takes its place; the first reads `inputs`, as every input
            does that no row gives. Run the binding at least once before.
        """
        self._session.live()
        return Chain(self, rows, carried)

    def _tensor(self, name: str, dtype: str) -> _Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=1) < 0:
            raise self._session.failed(f"the shape of {name!r} does not follow from the inputs'")
        host = pinned(self._device, shape, dtype)
        memory = Memory(self._device, host.nbytes)
        if not self._context.set_tensor_address(name, memory.address):
            raise self._session.failed(f"the buffer of {name!r} is refused")
        return _Tensor(host, memory)

    @contextmanager
    def scratch_held(self) -> Iterator[None]:
        """Hold a block of scratch memory: that of the last run where it is free, another that is, or wait for it.

        So runs that overlap part their blocks once, and keep them and what was recorded on them.
        """
        free = (one for one in (self._block, *self._blocks) if one.lock.acquire(blocking=False))
        block = next(free, None)
        if block is None:
            block = self._block
            block.lock.acquire()
        self._block = block
        try:
            self._use_scratch()
            yield
        finally:
            block.lock.release()

    def _use_scratch(self) -> None:
        """Point the context at the block; what was recorded on another one is void."""
        scratch = self._block.reserved(self._scratch_bytes)
        if self._scratch is None or self._scratch() is not scratch:
            self._context.set_device_memory(scratch.address, scratch.size)
            self._scratch, self._graph, self._runs = weakref.ref(scratch), None, 0
        if self.generation != self._session.generation:  # refitted: what was recorded may hold the weights before
            self.generation, self._graph, self._runs = self._session.generation, None, 0

    def _queue(self) -> None:
        for one in self._given.values():
            self._stream.upload(one.host, one.memory.address)
        self._enqueue()
        for one in self._made.values():
            self._stream.download(one.memory.address, one.host)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._session.failed("the run cannot be queued")


class Chain:
    """Runs of a binding recorded as one CUDA graph, such as all rows of a plan on a step engine."""

    def __init__(
        self, binding: TensorRtBinding, rows: Sequence[Mapping[str, Array]], carried: Mapping[str, str]
    ) -> None:
        self._binding, self._rows, self._carried = binding, rows, carried
        self._given = [
            {name: pinned(binding._device, values.shape, values.dtype) for name, values in row.items()} for row in rows
        ]
        for row, arrays in zip(rows, self._given, strict=True):
            for name, values in row.items():
                if values.shape != binding.inputs[name].shape:
                    expected = str(binding.inputs[name].shape)
                    raise ExecutionError("chain", f"shape of {name!r}", got=values.shape, expected=expected)
                arrays[name][...] = values
        self._scratch: weakref.ref[Memory] | None = None
        self._graph: Graph | None = None
        self._generation = binding.generation

    def run(self) -> None:
        """Run all rows; the binding's `outputs` are then the last one's.

        Raises:
            ExecutionError: CUDA or TensorRT failed, or the session is closed.
        """
        binding = self._binding
        binding._session.live()
        with binding.scratch_held():
            stale = self._scratch is not binding._scratch or self._generation != binding.generation
            if self._graph is None or stale:
                self._graph, self._scratch = binding._stream.recorded(self._queue), binding._scratch
                self._generation = binding.generation
            self._graph.launch(binding._stream)
            binding._stream.wait()

    def _queue(self) -> None:
        binding, stream = self._binding, self._binding._stream
        for tensor in binding._given.values():
            stream.upload(tensor.host, tensor.memory.address)
        for index, arrays in enumerate(self._given):
            for name, values in arrays.items():
                stream.upload(values, binding._given[name].memory.address)
            for name, output in self._carried.items() if index else ():
                target, source = binding._given[name].memory, binding._made[output].memory
                stream.move(source.address, target.address, target.size)
            binding._enqueue()
        for tensor in binding._made.values():
            stream.download(tensor.memory.address, tensor.host)


class _Kernels:
    """How an engine's contexts are made, and what TensorRT for RTX compiles for them on this GPU, kept in a file.

    The file lies beside the engine, in the user's own cache; TensorRT checks that it is whole and made here.
    """

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        self._trt, self._path = trt, path
        self._config = self._cache = None
        self._read = b""
        self.reused = False
        if hasattr(trt, "IRuntimeCache"):
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            # Kernels for the shapes at hand before the first run returns, so that no recorded graph holds others.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self._cache = self._config.create_runtime_cache()
            with suppress(OSError):  # they are compiled again
                self._read = path.read_bytes()
            self.reused = bool(self._read) and bool(self._cache.deserialize(self._read))
            self._config.set_runtime_cache(self._cache)

    def context(self, engine: Any) -> Any:
        """An execution context without scratch memory of its own."""
        if self._config is not None:
            return engine.create_execution_context(self._config)
        return engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def save(self) -> None:
        """Write what was compiled, where it is more than was read."""
        if self._cache is None:
            return
        made = bytes(self._cache.serialize())
        # A cache that cannot be written costs the next start its time, nothing else.
        with suppress(OSError):
            if made and made != self._read:
                write_whole(self._path, lambda stream: stream.write(made))


def _deserialized(runtime: Any, folder: Path, engine: Engine, log: Any) -> Any:
    (file,) = engine.files
    # Such an engine brings the part of TensorRT that runs it, as code.
    if VERSION_COMPATIBLE in engine.ingredients.flags and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine((folder / file).read_bytes())
    remedy = "Build the engine again with `tandemrt build-engine`."
    if loaded is None:
        said = "; ".join(one_line(message) for message in log.messages)[:1000] or "it did not say why"
        raise EngineError(str(folder / file), f"TensorRT refuses the engine ({said})", remedy=remedy)
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    listed = {spec.name for spec in (*engine.inputs, *engine.outputs)}
    if names != listed:
        expected = ", ".join(sorted(listed))
        raise EngineError(str(folder / file), "tensors", got=sorted(names), expected=expected, remedy=remedy)
    return loaded


def _log(trt: Any) -> Any:
    """A logger of the flavour that keeps its last errors for ours; the class is made here, where its base is known."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages = [*self.messages, message][-_KEPT_MESSAGES:]

    return Log()
