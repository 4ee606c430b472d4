"""Static FP8: graphs whose layers read and multiply E4M3, as Q/DQ pairs around them say; for NVIDIA GPUs from sm89 on.

The pairs stand where those of int8 do, with the same symmetric scales, a weight's by output channel. E4M3 has its
largest numbers at 448 and keeps its precision over many octaves below, so nothing is clipped and nothing is smoothed.

NVIDIA's ModelOpt makes such graphs too, by the same rule (its int8 graph with scales times 127/448). Its package
`nvidia-modelopt[onnx]` 0.47 asks for onnx 1.21 and onnxruntime-gpu 1.24, which is a second package of ONNX Runtime's
module: it cannot be installed beside those that run bundles. It also writes into the file that it reads. ONNX Runtime's
own quantizer scales E4M3 by the standard deviation and not by the range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ..engines.graph_files import read_graph, require_opset
from ..engines.job import Progress
from ..runtime.errors import BundleError
from .graph_writing import write_edited
from .int8 import EightBits, Int8Settings, int8_plan, watched, with_pairs
from .layers import layers_of, require_layers
from .observers import LEVELS
from .quantized import Quantized
from .ranges import LIMITS, Limits, Ranges, Samples, collect_ranges, silent

LARGEST = 448.0  # of E4M3 without infinities: OCP 8-bit Floating Point Specification, 2023
_E4M3_OPSET = 19


@dataclass(frozen=True, slots=True)
class Fp8Settings:
    """How a graph is quantized.

    keep: layers that stay in floating point, beside those that read nothing but the time step.
    """

    keep: tuple[str, ...] = ()
    limits: Limits = LIMITS


def quantize_fp8(
    model: Path,
    samples: Samples,
    out: Path,
    settings: Fp8Settings,
    ranges: Ranges | None = None,
    progress: Progress = silent,
) -> Quantized:
    """Write the ONNX file `out`: the graph `model` in E4M3, its weights in a file beside it.

    Inputs and outputs keep their names, types and symbolic shapes, layers their names.

    samples: gives what the graph is given, by input name, anew whenever it is called.
    ranges: of `collect_ranges` for `watched(layers_of(...))`, where they are known; `samples` is not called then.

    Raises:
        ArgumentError, ExecutionError, OSError: as `quantize_int8`.
        BundleError: as `quantize_int8`, or the opset has no E4M3.
    """
    graph, where = read_graph(model), model.parent.name
    require_e4m3(graph, where)
    layers = layers_of(graph, where)
    require_layers(settings.keep, layers, where)
    if ranges is None:
        ranges = collect_ranges(model, watched(layers), samples, settings.limits, progress)
    unclipped = Int8Settings(observer="minmax", smoothing=None, keep=settings.keep, limits=settings.limits)
    plan = int8_plan(graph, layers, ranges, unclipped, model.parent)
    plan = replace(plan, scales={value: scale * LEVELS / LARGEST for value, scale in plan.scales.items()})
    edited, edits = with_pairs(graph, plan, EightBits("fp8", LARGEST, _stored))
    write_edited(edited, edits, out, model.parent)
    facts: dict[str, Any] = {"method": "static E4M3, weights by channel", "samples": ranges.samples}
    return Quantized(tuple(one.name for one in plan.layers), plan.kept, facts)


def require_e4m3(graph: onnx.ModelProto, where: str) -> None:
    """Raise BundleError where a graph's opset has no E4M3."""
    if (opset := require_opset(graph, where)) < _E4M3_OPSET:
        expected = f"{_E4M3_OPSET} or newer, which has E4M3"
        raise BundleError(where, "opset", got=opset, expected=expected, remedy="Export it again.")


def _stored(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """To the nearest E4M3; beyond the largest there is only NaN."""
    return np.clip(values, -LARGEST, LARGEST).astype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
