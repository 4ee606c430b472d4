"""Exported graphs against the torch modules they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.errors import ExportError
from ..runtime.manifest import Evidence, Precision
from .modules import Graph
from .samples import Inputs

METRIC = "max_relative_error"
# Ten times the largest figure seen over the shapes family, SD1.5-sized and tiny random models.
THRESHOLDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 3e-2}


def verify(name: str, graph: Graph, model: Path, cases: Iterable[Inputs], precision: Precision) -> tuple[Evidence, ...]:
    """Compare a graph on disk, run by ONNX Runtime's CPU provider, with its torch module in float32.

    Raises:
        ExportError: ONNX Runtime cannot load or run it, an output's shape differs, or an error is over the threshold;
            the component, the worst output and its input shapes are named.
    """
    threshold, worst = THRESHOLDS[precision], (0.0, "", {})
    evidence = []
    run = _OnnxRun(name, model)
    for inputs in cases:
        shapes = {key: tuple(value.shape) for key, value in inputs.items()}
        errors = _errors(name, graph, run, inputs)
        output = max(errors, key=lambda each: errors[each])
        if errors[output] > worst[0]:
            worst = (errors[output], output, shapes)
        evidence.append(Evidence(metric=METRIC, value=errors[output], threshold=threshold, input_shapes=shapes))
    if worst[0] > threshold:
        raise ExportError(
            f"{name}: {worst[1]}",
            f"{METRIC} to PyTorch at {worst[2]}",
            got=worst[0],
            expected=f"at most {threshold:g} in {precision}",
            remedy="Nothing was published; please report the checkpoint's architecture."
            if precision == "fp32"
            else "Nothing was published; export with --dtype fp32.",
        )
    return tuple(evidence)


def max_relative_error(actual: npt.NDArray[np.generic], reference: npt.NDArray[np.generic]) -> float:
    """The largest absolute difference over the largest absolute reference value; infinite where NaN or Inf is met."""
    scale = float(np.abs(reference).max())
    error = float(np.abs(actual.astype(np.float64) - reference).max()) / (scale or 1.0)
    return error if np.isfinite(error) else float("inf")


def _errors(name: str, graph: Graph, run: _OnnxRun, inputs: Inputs) -> dict[str, float]:
    with torch.inference_mode():
        given = (torch.from_numpy(inputs[spec.name]) for spec in graph.inputs)
        reference = graph.module(*given)
    references = [reference] if isinstance(reference, torch.Tensor) else list(reference)
    errors = {}
    for spec, actual, tensor in zip(graph.outputs, run(inputs), references, strict=True):
        expected = tensor.numpy()
        if actual.shape != expected.shape:
            raise ExportError(f"{name}: {spec.name}", "output shape", got=actual.shape, expected=str(expected.shape))
        errors[spec.name] = max_relative_error(actual, expected)
    return errors


class _OnnxRun:
    """One model in ONNX Runtime on the CPU."""

    def __init__(self, name: str, model: Path) -> None:
        import onnxruntime  # noqa: PLC0415 — an extra of its own: onnxruntime or onnxruntime-gpu

        self._name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Spinning between nodes takes a core from whoever shares the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common base class
            raise self._failed("does not load", error) from error

    def __call__(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        try:
            outputs: list[npt.NDArray[np.generic]] = self._session.run(None, dict(inputs))
        except Exception as error:  # onnxruntime has no common base class
            raise self._failed("does not run", error) from error
        return outputs

    def _failed(self, what: str, error: Exception) -> ExportError:
        first = str(error).strip().splitlines()[0]
        return ExportError(self._name, f"the exported graph {what} in ONNX Runtime ({first})")
