"""Backends: how a model of a bundle is loaded and run on a target. Each is imported when it is first asked for."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArgumentError
from ..targets import Target, check_runnable
from .base import Session


def open_session(model: Path, target: Target, *, threads: int | None = None) -> Session:
    """Load a model on a target.

    threads: how many CPU threads one run may use, 1 or more; the backend's choice otherwise.

    Raises:
        ArgumentError: `threads` is below 1.
        TargetError: the target is not supported, not installed, or was not granted.
        ExecutionError: the backend cannot load the model.
    """
    check_runnable(target)
    if threads is not None and threads < 1:
        raise ArgumentError("threads", "number of threads", got=threads, expected="1 or more")
    from . import onnxruntime  # noqa: PLC0415 (a backend loads when it is used)

    return onnxruntime.OnnxRuntimeSession(model, target, threads)
