"""Exported graphs against the torch modules they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.errors import ExportError
from ..runtime.manifest import Evidence, Precision
from . import lazy
from .half import with_roundings
from .modules import Graph
from .samples import Inputs
from .session import OnnxRun

Outputs = list[npt.NDArray[Any]]

METRIC = "max_relative_error"
# Seen at most: 1.7e-5 in fp32 and 4.3e-3 in fp16 over the shapes family, 3e-6 in fp32 on SD1.5's UNet.
THRESHOLDS: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2}


@dataclass(frozen=True)
class Comparison:
    """The output that was farthest from PyTorch's on one set of inputs."""

    output: str
    evidence: Evidence


def compare(
    name: str, graph: Graph, model: Path, cases: Iterable[Inputs], precision: Precision
) -> tuple[Comparison, ...]:
    """Run a graph's torch module in float32, then its file in ONNX Runtime's CPU provider, on the same inputs.

    ONNX Runtime's CPU provider computes float16 graphs in float32 and drops the roundings between; a float16 graph is
    therefore run in a form that rounds every float16 value, as a GPU does.

    Raises:
        ExportError: ONNX Runtime cannot load or run the graph, or an output's shape differs.
        CheckpointError: the weights' file is damaged.
    """
    cases = tuple(cases)
    references = [_reference(graph, inputs) for inputs in cases]
    if precision == "fp32":
        run = OnnxRun(name, model)
    else:
        run = OnnxRun(name, with_roundings(model), model.parent, in_order=True)
    return tuple(
        _compared(name, graph, inputs, run(inputs), reference, THRESHOLDS[precision])
        for inputs, reference in zip(cases, references, strict=True)
    )


def require_close(name: str, comparisons: Sequence[Comparison]) -> None:
    """Check every comparison against its threshold.

    Raises:
        ExportError: one is over it; component, output and input shapes of the worst are named.
    """
    worst = max(comparisons, key=lambda each: each.evidence.value)
    evidence = worst.evidence
    if not evidence.holds:
        raise ExportError(
            f"{name}: {worst.output}",
            f"{evidence.metric} to PyTorch at {evidence.input_shapes}",
            got=evidence.value,
            expected=f"at most {evidence.threshold:g}",
            remedy="Nothing was published. In fp16, try --dtype fp32.",
        )


def max_relative_error(actual: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """The largest absolute difference over the largest absolute reference value; infinite where NaN or Inf is met."""
    scale = float(np.abs(reference).max())
    with np.errstate(invalid="ignore"):
        error = float(np.abs(actual.astype(np.float64) - reference).max()) / (scale or 1.0)
    return error if np.isfinite(error) else float("inf")


def _reference(graph: Graph, inputs: Inputs) -> Outputs:
    result = lazy.run(graph.module, *(torch.from_numpy(inputs[spec.name]) for spec in graph.inputs))
    return [tensor.numpy() for tensor in ([result] if isinstance(result, torch.Tensor) else result)]


def _compared(
    name: str, graph: Graph, inputs: Inputs, outputs: Outputs, references: Outputs, threshold: float
) -> Comparison:
    errors = {}
    for spec, actual, reference in zip(graph.outputs, outputs, references, strict=True):
        if actual.shape != reference.shape:
            raise ExportError(f"{name}: {spec.name}", "output shape", got=actual.shape, expected=str(reference.shape))
        errors[spec.name] = max_relative_error(actual, reference)
    output = max(errors, key=lambda each: errors[each])
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    return Comparison(output, Evidence(metric=METRIC, value=errors[output], threshold=threshold, input_shapes=shapes))
