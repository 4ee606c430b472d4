"""What runs graphs for a comparison, as Polygraphy's runners: ONNX Runtime as it is, and every target's own backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.backends import open_session
from ..runtime.backends.base import Array, Session
from ..runtime.errors import ExecutionError, TandemError, TargetError
from ..runtime.targets import ENGINES_ONLY, Target

_FATAL = 4  # of ONNX Runtime's log severities


def require_polygraphy() -> None:
    """Raise TargetError where Polygraphy is not installed."""
    try:
        import polygraphy  # noqa: F401, PLC0415 (of the extra `engines`)
    except ImportError as error:
        remedy = 'Run `pip install "tandemrt[engines,cpu]"`.'
        raise TargetError("verify --layers", f"needs polygraphy ({error})", remedy=remedy) from error


def reference_runner(model: Path) -> Any:
    """ONNX Runtime's CPU provider on a graph, node by node as it stands: nothing is fused or rearranged."""
    import onnxruntime  # noqa: PLC0415 (heavy, and of an extra)
    from polygraphy.backend.onnxrt import OnnxrtRunner  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False
    return OnnxrtRunner(
        lambda: onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]),
        name="ONNX Runtime",
    )


def target_runner(model: Path, target: Target, feeds: Mapping[str, Array]) -> Any:
    """A graph on a target: loaded as a pipeline would load it, or built for these inputs where a target needs engines.

    Raises:
        TargetError: the target is not available here.
    """
    if target.backend in ENGINES_ONLY:
        return _tensorrt_runner(model, target.backend, feeds)
    return session_runner(lambda: open_session(model, target), str(target))


def session_runner(load: Any, name: str) -> Any:
    """A session of the runtime's, loaded by `load` when it is needed, as a runner."""
    from polygraphy.backend.base import BaseRunner  # noqa: PLC0415
    from polygraphy.common import TensorMetadata  # noqa: PLC0415

    class SessionRunner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            self.session: Session = load()

        def deactivate_impl(self) -> None:
            self.session.close()
            del self.session

        def get_input_metadata_impl(self) -> Any:
            listed = TensorMetadata()
            for spec in self.session.inputs:
                listed.add(spec.name, spec.dtype, [size if isinstance(size, int) else None for size in spec.shape])
            return listed

        def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
            binding = self.session.bind({spec.name: feed_dict[spec.name].shape for spec in self.session.inputs})
            for given, array in binding.inputs.items():
                array[...] = feed_dict[given]
            binding.run()
            return dict(binding.outputs)

    return SessionRunner(name=name)


def _tensorrt_runner(model: Path, backend: str, feeds: Mapping[str, Array]) -> Any:
    _choose_flavour(backend)
    from polygraphy.backend.trt import (  # noqa: PLC0415
        CreateConfig,
        EngineFromNetwork,
        NetworkFromOnnxPath,
        Profile,
        TrtRunner,
    )

    profile = Profile()
    for name, array in feeds.items():
        profile.add(name, array.shape, array.shape, array.shape)
    network = NetworkFromOnnxPath(str(model), strongly_typed=True)
    return TrtRunner(EngineFromNetwork(network, CreateConfig(profiles=[profile])), name=backend)


def _choose_flavour(backend: str) -> None:
    """Let Polygraphy use a flavour of TensorRT, for which it decides when its part for it is imported.

    Raises:
        TargetError: it uses the other one by now.
    """
    from polygraphy import config  # noqa: PLC0415

    with_rtx = backend == "tensorrt-rtx"
    if with_rtx != config.USE_TENSORRT_RTX and "polygraphy.backend.trt" in sys.modules:
        what = "Polygraphy uses the other flavour of TensorRT in this process"
        raise TargetError(backend, what, remedy="Compare with each flavour in a command of its own.")
    config.USE_TENSORRT_RTX = with_rtx


@contextmanager
def quietly(where: str) -> Iterator[None]:
    """Let Polygraphy say nothing of its own, and turn what it or a backend raises into our error.

    Raises:
        ExecutionError: a graph cannot be loaded or run; `where` names it.
    """
    from polygraphy.logger import G_LOGGER  # noqa: PLC0415

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    except (TandemError, OSError, MemoryError):
        raise
    except Exception as error:  # backends' exceptions have no common class
        reason = " ".join(str(error).split())[:500]
        raise ExecutionError(where, f"cannot be run layer by layer ({reason})") from error
