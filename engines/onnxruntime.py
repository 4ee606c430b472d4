"""ONNX Runtime engines: the graph optimized ahead of time for one execution provider, weights in a file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.backends.modules import imported
from ..runtime.backends.onnxruntime import EXACT_PRODUCTS, with_pairs_of_e4m3
from ..runtime.engine_files import GRAPH_NAME, Layer
from ..runtime.errors import EngineError, TargetError
from .job import Built, Job, Progress

WEIGHTS_NAME = "model.onnx_data"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_WEIGHTS_OUTSIDE_FROM_BYTES = 1024
_FATAL = 4


def build(job: Job, progress: Progress) -> Built:
    """Optimize the graph for the device's provider, layouts and fusions included, and save it.

    Raises:
        TargetError: ONNX Runtime is missing, or has not the provider.
        EngineError: the graph cannot be loaded.
    """
    ort = imported("onnxruntime")
    progress(f"{job.component}: optimize", 0, 2)
    path = Path(job.folder, GRAPH_NAME)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("optimized_model_external_initializers_file_name", WEIGHTS_NAME),
        ("optimized_model_external_initializers_min_size_in_bytes", str(_WEIGHTS_OUTSIDE_FROM_BYTES)),
        # The file's name must not choose its parser: ONNX Runtime would read its own flatbuffer format too.
        ("load_model_format", "ONNX"),
    ):
        options.add_session_config_entry(f"session.{key}", value)
    options.add_session_config_entry(*EXACT_PRODUCTS)
    provider = PROVIDERS[job.device]
    try:
        source = _source(job, options)
        session = with_pairs_of_e4m3(options, lambda: ort.InferenceSession(source, options, providers=[provider]))
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        reason = " ".join(str(error).split())[:500]
        raise EngineError(job.component, f"ONNX Runtime cannot optimize the graph ({reason})") from error
    if session.get_providers()[0] != provider:
        raise TargetError(job.component, "execution providers granted", got=session.get_providers(), expected=provider)
    progress(f"{job.component}: inspect", 1, 2)
    files = (GRAPH_NAME, WEIGHTS_NAME) if Path(job.folder, WEIGHTS_NAME).exists() else (GRAPH_NAME,)
    return Built(files=files, layers=tuple(_layers(path)), versions={"onnxruntime": ort.__version__})


def _source(job: Job, options: Any) -> str | bytes:
    """The graph's path or, where it has attention to be one node, the graph that has, its weights still beside it."""
    if not fuses_attention(job.device, job.precision):
        return job.model
    from .attention import fused_attention  # noqa: PLC0415 (onnx, what plans alone do without)
    from .graph_files import read_graph  # noqa: PLC0415

    path = Path(job.model)
    graph, count = fused_attention(read_graph(path))
    if not count:
        return job.model
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    serialized: bytes = graph.SerializeToString()
    return serialized


def fuses_attention(device: str, precision: str) -> bool:
    """Whether attention becomes one node; the CPU provider has that in float32 alone."""
    return device != "cpu" or precision == "fp32"


def require_buildable(device: str) -> None:
    """Raise TargetError unless ONNX Runtime has the device's execution provider here."""
    if device not in PROVIDERS:
        raise TargetError(
            f"target onnxruntime:{device}",
            "this execution provider compiles when it loads a graph, nothing is built ahead of time",
            expected=f"onnxruntime:{' or onnxruntime:'.join(PROVIDERS)}",
            remedy=f"Run on onnxruntime:{device} as it is, or build for {device}.",
        )
    available = imported("onnxruntime").get_available_providers()
    if PROVIDERS[device] not in available:
        raise TargetError(
            f"target onnxruntime:{device}",
            "execution provider that is not here",
            got=PROVIDERS[device],
            expected=f"one of {', '.join(available)}",
            remedy='Run `pip install "tandemrt[gpu]"` on a machine with a GPU, or build for onnxruntime:cpu.',
        )


def _layers(path: Path) -> list[Layer]:
    """The nodes of the optimized graph; those with a domain of ONNX Runtime's own are fusions or layouts of it."""
    import onnx  # noqa: PLC0415 (what plans alone do without)

    graph = onnx.load(path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return [
        Layer(
            name=node.name,
            kind=f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
            precision=onnx.TensorProto.DataType.Name(types.get(node.output[0], 0)).lower().replace("undefined", ""),
        )
        for node in graph.node
    ]
