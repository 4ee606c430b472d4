"""Backends: how a model of a bundle is loaded and run on a target. Each is imported when it is first asked for."""

from __future__ import annotations

from pathlib import Path

from ..arguments import thread_count
from ..targets import Target, check_runnable
from .base import Session


def open_session(model: Path, target: Target, *, threads: int | None = None) -> Session:
    """Load a model on a target.

    threads: how many CPU threads one run may use, 1 to 1024; the backend's choice otherwise.

    Raises:
        ArgumentError: `threads` is no whole number in 1..1024.
        TargetError: the target is not supported, not installed, or was not granted.
        ExecutionError: the backend cannot load the model.
    """
    check_runnable(target)
    threads = thread_count("threads", threads)
    if target.backend == "openvino":
        from . import openvino  # noqa: PLC0415 (a backend loads when it is used)

        return openvino.OpenVinoSession(model, target, threads)
    from . import onnxruntime  # noqa: PLC0415

    return onnxruntime.OnnxRuntimeSession(model, target, threads)
