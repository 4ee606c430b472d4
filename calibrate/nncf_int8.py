"""Static int8 by NNCF, Intel's quantizer for OpenVINO: another way to the graphs that `int8` makes.

It moves outlier channels into weights (SmoothQuant) and corrects biases for what rounding shifts. Ranges are symmetric,
which TensorRT asks for and NNCF's own choice for transformers is not; what is never below 0 it keeps in uint8 even so,
which TensorRT has not. The graph and its copies are held in memory whole, up to 2 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import onnx

from ..engines.graph_files import read_graph
from ..runtime.errors import ArgumentError, ExecutionError
from .graph_runs import Array
from .layers import layers_of, of_time_alone, require_layers
from .quantized import Quantized
from .ranges import Samples
from .smoothing import require_alpha

MOST_BYTES = 2 << 30  # of a graph with its weights: what one protobuf message holds


@dataclass(frozen=True, slots=True)
class NncfSettings:
    """How a graph is quantized.

    smoothing: SmoothQuant's alpha for matrix products, None for none. keep: layers that stay in floating point, beside
    those that read nothing but the time step.
    """

    smoothing: float | None = 0.5
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_alpha(self.smoothing)


def require_nncf() -> None:
    """Raise ArgumentError where NNCF is not installed."""
    if find_spec("nncf") is None:
        raise ArgumentError("nncf", "is not installed", remedy='Install it: pip install "tandemrt[nncf]".')


def quantize_nncf(model: Path, samples: Samples, out: Path, settings: NncfSettings) -> Quantized:
    """Write the ONNX file `out`: the graph `model` in int8 by NNCF, its weights in a file beside it.

    samples: gives what the graph is given, by input name; all of them are kept in memory.

    Raises:
        ArgumentError: a graph that is quantized, has no layers or is over 2 GB, unknown layers to keep, no samples; or
            NNCF is not installed.
        ExecutionError: NNCF failed.
        OSError: `out` cannot be written.
    """
    require_nncf()
    graph, where = read_graph(model), model.parent.name
    layers = layers_of(graph, where)
    require_layers(settings.keep, layers, where)
    size = sum(path.stat().st_size for path in model.parent.iterdir())
    if size > MOST_BYTES:
        remedy = "Quantize it without NNCF, or a bundle in fp16."
        raise ArgumentError(where, "bytes of its files", got=size, expected=f"at most {MOST_BYTES}", remedy=remedy)
    given = list(samples())
    if not given:
        raise ArgumentError(where, "no samples to quantize with")
    alone = of_time_alone(graph.graph)
    kept = [one.name for one in layers if one.name in settings.keep or one.reads in alone]
    try:
        made = _by_nncf(onnx.load(model), given, kept, settings.smoothing)
    except Exception as error:  # NNCF's exceptions have no common class
        raise ExecutionError(where, f"NNCF failed ({type(error).__name__}: {error})") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = f"{out.name}_data"
    onnx.save_model(made, str(out), save_as_external_data=True, location=beside, size_threshold=1024)
    eight = {name for node in made.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    weights = {node.name: node.input[1] for node in made.graph.node if len(node.input) > 1}
    quantized = tuple(one.name for one in layers if weights[one.name] in eight)
    facts = {
        "method": "static int8, weights by channel",
        "tool": "nncf",
        "version": version("nncf"),
        "smoothing": settings.smoothing,
        "samples": len(given),
    }
    return Quantized(quantized, tuple(one.name for one in layers if one.name not in quantized), facts)


def _by_nncf(
    model: onnx.ModelProto, samples: list[Mapping[str, Array]], kept: list[str], smoothing: float | None
) -> onnx.ModelProto:
    """The graph in int8. NNCF writes progress to stdout, where results go: it is told of stderr."""
    with redirect_stdout(sys.stderr):
        import nncf  # noqa: PLC0415 (seconds; its log keeps the stdout of this moment)
        from nncf.quantization.advanced_parameters import (  # noqa: PLC0415
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
        )

        alpha = -1 if smoothing is None else smoothing  # NNCF's word for none
        made: onnx.ModelProto = nncf.quantize(
            model,
            nncf.Dataset(samples),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=kept),
            advanced_parameters=AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=alpha),
            ),
        )
    return made
