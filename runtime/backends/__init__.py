"""Backends: how a model of a bundle is loaded and run on a target. Each is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import thread_count
from ..engine_files import GRAPH_NAME
from ..errors import TargetError
from ..targets import ENGINES_ONLY, PORTABLE, Target, check_runnable
from .base import Session

if TYPE_CHECKING:
    from ..engine_search import Found


def streams_for(target: Target, calls: int) -> int:
    """As how many streams a model must be opened that so many calls run on at once.

    ONNX Runtime takes calls from several threads as it is, and shares its threads among them: a second session was no
    faster, and of a bundle's graph would hold the weights a second time. An engine on a GPU is told later; see
    `Overlapping`.
    """
    return calls if target.backend == "openvino" else 1


def open_session(
    model: Path,
    target: Target,
    *,
    threads: int | None = None,
    streams: int = 1,
    unchanged: Callable[[], object] = lambda: None,
) -> Session:
    """Load an ONNX model on a target that runs ONNX.

    threads: how many CPU threads its runs may use, 1 to 1024; the backend's choice otherwise.
    streams: of `streams_for`; among them the threads are divided.
    unchanged: called when the model's files are to be read once more, as for a second batch; raises where they have
        changed, and what it raises ends the binding.

    Raises:
        ArgumentError: `threads` is no whole number in 1..1024.
        TargetError: the target is not supported, not installed, or was not granted.
        ExecutionError: the backend cannot load the model.
    """
    check_runnable(target)
    threads = thread_count("threads", threads)
    if target.backend == "openvino":
        from . import openvino  # noqa: PLC0415 (a backend loads when it is used)

        return openvino.OpenVinoSession.of_graph(model, target, threads, streams, unchanged)
    from . import onnxruntime  # noqa: PLC0415

    return onnxruntime.OnnxRuntimeSession(model, target, threads)


def open_engine(found: Found, target: Target, *, threads: int | None = None, streams: int = 1) -> Session:
    """Load a compiled engine, whose files `check_engine_files` has proved.

    threads, streams: as of `open_session`; an engine on a GPU has neither.

    Raises:
        TargetError: the target is not installed or was not granted, or there is no GPU.
        EngineError, ExecutionError: the backend refuses the engine.
    """
    check_runnable(target)
    if target.backend in ENGINES_ONLY:
        from . import tensorrt  # noqa: PLC0415

        return tensorrt.TensorRtSession(found.folder, found.engine, target.gpus[0])
    if target.backend == "openvino":
        from . import openvino  # noqa: PLC0415

        return openvino.OpenVinoSession.of_engine(found, target, thread_count("threads", threads), streams)
    from . import onnxruntime  # noqa: PLC0415

    model, count = found.folder / GRAPH_NAME, thread_count("threads", threads)
    return onnxruntime.OnnxRuntimeSession(model, target, count, engine_of=found.engine.component)


def target_here(target: Target) -> Target:
    """A target of engines alone with the architecture of its first GPU.

    Raises:
        TargetError: there is no such GPU, or the target is for others.
    """
    from . import cuda  # noqa: PLC0415

    here = cuda.device(target.gpus[0]).architecture
    named = target.device.split("+")
    if target.device != PORTABLE and here not in named:
        every = dict.fromkeys(cuda.device(gpu).architecture for gpu in sorted(target.gpus))
        remedy = f"Ask for {target.backend}:{'+'.join(every)}, and build its engines."
        what, expected = f"architecture of GPU {target.gpus[0]}", " or ".join(named)
        raise TargetError(f"target {target}", what, got=here, expected=expected, remedy=remedy)
    return replace(target, device=here)


def copies_directly(target: Target) -> bool:
    """Whether each GPU of a target of engines alone copies from the others without the host's memory.

    Raises:
        TargetError: there is no such GPU.
    """
    from . import cuda  # noqa: PLC0415

    gpus = [cuda.device(gpu) for gpu in target.gpus]
    return all(own.reaches(other) for own in gpus for other in gpus if own is not other)


def gpu_names(target: Target) -> tuple[str, ...]:
    """What the GPUs of a target of engines alone are called, with CUDA's index; of other targets nothing.

    Raises:
        TargetError: there is no such GPU.
    """
    if target.backend not in ENGINES_ONLY:
        return ()
    from . import cuda  # noqa: PLC0415

    return tuple(f"{gpu}: {cuda.device(gpu).name}" for gpu in target.gpus)
