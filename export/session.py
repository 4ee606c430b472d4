"""A graph on disk in ONNX Runtime's CPU provider, as every check of an export runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxscript import ir

from ..runtime.errors import ExportError


class OnnxRun:
    """One model in ONNX Runtime on the CPU, called with arrays by name; `name` is the component's, for errors.

    model: a file, or a graph in memory whose weights may lie beside it in `folder`. Weights of their own file are
        mapped, never copied, not even into the layout that a kernel likes best.
    in_order: nodes run one by one as the graph has them; nothing is folded, fused or reordered.

    Raises, as calling it does:
        ExportError: ONNX Runtime cannot load or run the graph.
    """

    def __init__(
        self, name: str, model: Path | ir.Model, folder: Path | None = None, *, in_order: bool = False
    ) -> None:
        import onnxruntime  # noqa: PLC0415 — an extra of its own: onnxruntime or onnxruntime-gpu

        self._name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Spinning between nodes takes a core from whoever shares the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if in_order:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise self._failed("does not load", error) from error

    def __call__(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        try:
            outputs: list[npt.NDArray[Any]] = self._session.run(None, dict(inputs))
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise self._failed("does not run", error) from error
        return outputs

    def named(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """As a call, with the outputs by name and whole numbers in the graph's own type."""
        narrow = {each.name for each in self._session.get_inputs() if each.type == "tensor(int32)"}
        given = {name: values.astype(np.int32) if name in narrow else values for name, values in inputs.items()}
        return dict(zip((each.name for each in self._session.get_outputs()), self(given), strict=True))

    def _failed(self, what: str, error: Exception) -> ExportError:
        first = str(error).strip().splitlines()[0]
        return ExportError(self._name, f"the exported graph {what} in ONNX Runtime ({first})")
