"""Run diffusion bundles without PyTorch: `Pipeline.open("bundle/")` and call it with a prompt."""

from .cloud import Cloud
from .errors import (
    ArgumentError,
    BenchmarkError,
    BundleError,
    CacheError,
    CacheFullError,
    CalibrationError,
    CancelledError,
    CheckpointError,
    CloudError,
    EngineError,
    ExecutionError,
    ExportError,
    PlanError,
    RequestError,
    TandemError,
    TargetError,
    UntrustedError,
)
from .handover import Handover
from .output import Output, StepEvent, Timings
from .pipeline import Pipeline
from .request import Request
from .stream import Stream
from .trace import traced

__all__ = [
    "ArgumentError",
    "BenchmarkError",
    "BundleError",
    "CacheError",
    "CacheFullError",
    "CalibrationError",
    "CancelledError",
    "CheckpointError",
    "Cloud",
    "CloudError",
    "EngineError",
    "ExecutionError",
    "ExportError",
    "Handover",
    "Output",
    "Pipeline",
    "PlanError",
    "Request",
    "RequestError",
    "StepEvent",
    "Stream",
    "TandemError",
    "TargetError",
    "Timings",
    "UntrustedError",
    "traced",
]
