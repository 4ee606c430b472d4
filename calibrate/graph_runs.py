"""Graphs made in memory, their weights in files of another folder, run on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..runtime.backends.buffers import one_line
from ..runtime.backends.modules import imported
from ..runtime.errors import ExecutionError

Array = npt.NDArray[Any]
_FATAL = 4  # of ONNX Runtime's log severities


class GraphRun:
    """A graph on ONNX Runtime's CPU provider, called with arrays by name for all its outputs by name.

    Weights are mapped from the files of `folder`, and not packed anew, so that they take no memory of their own.

    left_out: ONNX Runtime's names of optimizations that are not to be made.

    Raises, as calling it does:
        ExecutionError: ONNX Runtime cannot load or run the graph; `where` names it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        where: str,
        threads: int | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        ort = imported("onnxruntime")
        self._where = where
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = threads or 0
        options.enable_mem_pattern = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=list(left_out)
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            raise ExecutionError(where, f"ONNX Runtime cannot load the graph ({one_line(error)})") from error
        self._outputs = [one.name for one in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {one.name: np.asarray(feeds[one.name]) for one in self._session.get_inputs()}
        try:
            made = self._session.run(None, given)
        except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
            raise ExecutionError(self._where, f"ONNX Runtime failed ({one_line(error)})") from error
        return dict(zip(self._outputs, made, strict=True))
