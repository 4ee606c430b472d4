"""TensorRT and TensorRT for RTX, which share their interface: engines are loaded, refitted, and bound to buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..engine_files import REFIT, VERSION_COMPATIBLE, Engine
from ..engine_search import profile_for
from ..errors import EngineError, ExecutionError
from ..files import sweep_parts, write_whole
from .base import Array, Shape
from .buffers import REMOVE_AND_BUILD, require_numpy_types, symbol_sizes
from .cuda import Scratch, device
from .modules import imported
from .refit import Refit
from .tensorrt_binding import TensorRtBinding
from .tensorrt_log import error_log, last_said


class TensorRtSession:
    """An engine on a GPU; see `Session`. Every binding has an execution context, which serves one thread.

    device, blocks, generation: as of `Owner`.
    """

    def __init__(self, folder: Path, engine: Engine, gpu: int = 0) -> None:
        """Load the engine in `folder`, its files proved by the caller to be those that `engine` lists.

        gpu: on which, by CUDA's index.

        Raises:
            TargetError: there is no such GPU, or the flavour of TensorRT is not installed.
            EngineError: TensorRT refuses the engine.
        """
        self._name, self._engine = engine.component, engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        require_numpy_types(self._name, (*self.inputs, *self.outputs))
        self.device = device(gpu)
        self.blocks: Sequence[Scratch] = self.device.blocks(1)
        trt = imported(engine.ingredients.backend)
        self._log = error_log(trt)
        with self.device.current():  # an engine is of the device that is current when it is loaded
            self._runtime = trt.Runtime(self._log)
            self._loaded: Any = _deserialized(self._runtime, folder, engine, self._log)
            self._kernels = _Kernels(trt, self._loaded, folder / f"kernels-{self.device.architecture}.bin")
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
        with self.device.current():
            context = self._kernels.context(engine)
            if context is None:
                raise self.failed("an execution context cannot be made")
            return TensorRtBinding(self, context, profile, input_shapes)

    def overlap(self, runs: int) -> None:
        """See `Overlapping`; each run takes one of so many blocks of scratch memory."""
        self.blocks = self.device.blocks(max(runs, len(self.blocks)))

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
        with ExitStack() as stack, self.device.current():
            for scratch in self.blocks:
                stack.enter_context(scratch.lock)
            self.generation += 1
            self._refit.apply(engine, base, changes)

    def close(self) -> None:
        """Free the engine; a second call does nothing. The kernels it compiled are kept for the next time."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            with self.device.current():
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
        return ExecutionError(self._name, f"TensorRT failed: {what} ({last_said(self._log)})")


class _Kernels:
    """How an engine's contexts are made, and what TensorRT for RTX compiles for them on this GPU, kept in a file.

    The file lies beside the engine, in the user's own cache; TensorRT checks that it is whole and made here.
    """

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        self._trt, self._path = trt, path
        self._config = self._cache = None
        self.kept = b""  # what was read and taken
        if hasattr(trt, "IRuntimeCache"):
            sweep_parts(path.parent)
            self._config = engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            # Kernels for the shapes at hand before the first run returns, so that no recorded graph holds others.
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self._cache = self._config.create_runtime_cache()
            with suppress(OSError):  # they are compiled again
                read = path.read_bytes()
                self.kept = read if read and self._cache.deserialize(read) else b""
            self._config.set_runtime_cache(self._cache)

    def context(self, engine: Any) -> Any:
        """An execution context without scratch memory of its own."""
        if self._config is not None:
            return engine.create_execution_context(self._config)
        return engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def save(self) -> None:
        """Write what was compiled, where it is more than was taken."""
        if self._cache is None:
            return
        made = bytes(self._cache.serialize())
        # A cache that cannot be written costs the next start its time, nothing else.
        with suppress(OSError):
            if made and made != self.kept:
                write_whole(self._path, lambda stream: stream.write(made))


def _deserialized(runtime: Any, folder: Path, engine: Engine, log: Any) -> Any:
    (file,) = engine.files
    # Such an engine brings the part of TensorRT that runs it, as code.
    if VERSION_COMPATIBLE in engine.ingredients.flags and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine((folder / file).read_bytes())
    remedy = REMOVE_AND_BUILD
    if loaded is None:
        raise EngineError(str(folder / file), f"TensorRT refuses the engine ({last_said(log)})", remedy=remedy)
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    listed = {spec.name for spec in (*engine.inputs, *engine.outputs)}
    if names != listed:
        expected = ", ".join(sorted(listed))
        raise EngineError(str(folder / file), "tensors", got=sorted(names), expected=expected, remedy=remedy)
    return loaded
