"""Run diffusion bundles without PyTorch: `Pipeline.open("bundle/")` and call it with a prompt."""

from .errors import (
    ArgumentError,
    BundleError,
    CancelledError,
    CheckpointError,
    ExecutionError,
    ExportError,
    PlanError,
    RequestError,
    TandemError,
    TargetError,
)
from .pipeline import Pipeline

__all__ = [
    "ArgumentError",
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "ExecutionError",
    "ExportError",
    "Pipeline",
    "PlanError",
    "RequestError",
    "TandemError",
    "TargetError",
]
