"""OpenVINO engines: the compiled model as the blob that OpenVINO imports without compiling it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.backends.modules import imported
from ..runtime.backends.openvino import device_name, exact_products, precision_hint
from ..runtime.backends.openvino_graph import read_graph
from ..runtime.engine_files import InputRange, Layer
from ..runtime.errors import EngineError, TargetError
from .job import Built, Job, Progress

BLOB_NAME = "engine.blob"
_NEEDS = {"bf16": "BF16"}
_NO_LAYERS = frozenset({"Const", "Input", "Output"})


def build(job: Job, progress: Progress) -> Built:
    """Compile for one profile, with bounds where it has ranges, and export the blob.

    Raises:
        TargetError: OpenVINO is missing, or the processor lacks the precision.
        EngineError: the graph cannot be read, compiled or exported.
    """
    ov = imported("openvino")
    try:
        core = ov.Core()
        progress(f"{job.component}: read", 0, 3)
        hint = str(job.flags["INFERENCE_PRECISION_HINT"])
        graph = read_graph(core, Path(job.model), hint, job.device)
        (ranges,) = job.profiles
        graph.reshape({name: _bounded(ov, one) for name, one in ranges.items()})
        progress(f"{job.component}: compile", 1, 3)
        compiled = core.compile_model(graph, job.device.upper(), job.flags)
        granted = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if granted != hint:
            raise TargetError(job.component, "precision that OpenVINO granted", got=granted, expected=hint)
        progress(f"{job.component}: export", 2, 3)
        # OpenVINO 2026.4 exports into memory alone, so a blob takes its size there for a moment.
        blob = compiled.export_model()
        with Path(job.folder, BLOB_NAME).open("wb") as stream:
            stream.write(blob.getbuffer())
        layers = tuple(_layer(op) for op in compiled.get_runtime_model().get_ordered_ops())
    except (TargetError, OSError):
        raise
    except Exception as error:  # OpenVINO raises plain RuntimeError
        reason = " ".join(str(error).split())[-500:]
        raise EngineError(job.component, f"OpenVINO cannot build the graph ({reason})") from error
    return Built(
        files=(BLOB_NAME,),
        layers=tuple(layer for layer in layers if layer.kind not in _NO_LAYERS),
        versions={"openvino": ov.__version__},
    )


def configuration(device: str, precision: str) -> dict[str, str | int | bool]:
    """What OpenVINO is told to compile for a device in a precision."""
    hint = precision_hint(device, precision)
    # One stream: a picture's models run one after the other, each on all threads.
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        **exact_products(device),
    }


def require_buildable(device: str, precision: str) -> None:
    """Check that OpenVINO has a device here, and that it computes in a precision.

    Raises:
        TargetError: it has not, or does not, or this version of tandemrt runs nothing on the device.
    """
    if device == "npu":
        what = "an NPU takes fixed shapes alone, and this version of tandemrt runs nothing on one"
        raise TargetError(f"target openvino:{device}", what, remedy="Build for openvino:cpu or openvino:gpu.")
    device_name(device)
    able = imported("openvino").Core().get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    if precision in _NEEDS and _NEEDS[precision] not in able:
        raise TargetError(
            f"target openvino:{device}:{precision}",
            "this device has no instructions for the precision",
            got=", ".join(sorted(able)),
            remedy=f"Build for openvino:{device}:fp32.",
        )


def _bounded(ov: Any, one: InputRange) -> Any:
    return ov.PartialShape([ov.Dimension(low, high) for low, high in zip(one.min, one.max, strict=True)])


def _layer(op: Any) -> Layer:
    facts = {key: str(value.astype(str)) for key, value in op.get_rt_info().items() if hasattr(value, "astype")}
    return Layer(
        name=op.get_friendly_name(),
        kind=facts.get("layerType", op.get_type_name()),
        precision=facts.get("runtimePrecision", ""),
        nodes=tuple(filter(None, facts.get("originalLayersNames", "").split(","))),
    )
