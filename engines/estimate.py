"""What a build will take, before it starts, and what the largest calls of its engine will.

A build's memory, time and size are from the weights, the graph and the target, whatever the profile. A call's memory
and work follow from the graph's shapes.

Planes through what builds took of the shapes family and, in fp16 at true size, of the components of Hybrid-SD, SDXS and
SDXL (bench/evidence/engine_builds*.json; profiles of 512x512, of SDXL 1024x1024; two cores, other work beside). Time is
the roughest: other work doubles it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..runtime.engine_files import Ingredients
from ..runtime.onnx_files import node_count
from ..runtime.targets import ENGINES_ONLY
from ..runtime.variant import UPDATE
from .plan import Request

_MEMINFO = Path("/proc/meminfo")
_LARGEST_KEPT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory of the builder's process, its time, and the size of what it leaves."""

    memory_bytes: int
    build_s: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LargestCall:
    """The largest call of a profile: memory beside the weights, by the graph, and multiply-adds.

    exceeds_memory: whether that and the weights are more than this machine has, where it is to run here.
    """

    profile: str
    estimated_memory_bytes: int
    multiply_adds: int
    exceeds_memory: bool


@dataclass(frozen=True, slots=True)
class _Rates:
    """Of a backend: memory, seconds and size with next to nothing to build, and what weights and nodes add.

    memory_per_byte: of the graph's weights as they are stored; memory_per_half_byte: where that is in fp16.
    seconds_per_gb: of the engine's weights.
    repeated: the share of the time that each further architecture or profile of one engine takes.
    """

    memory_bytes: float
    memory_per_byte: float
    memory_per_half_byte: float
    seconds: float
    seconds_per_node: float
    seconds_per_gb: float
    size_bytes: float
    repeated: float = 0.0


_RATES = {
    "tensorrt-rtx": _Rates(0.45e9, 3.4, 3.4, 0.5, 5e-3, 12.5, 10e6, 0.3),
    "tensorrt": _Rates(1.5e9, 3.4, 3.4, 20.0, 5e-3, 150.0, 10e6, 0.8),
    "openvino": _Rates(0.12e9, 4.6, 4.6, 0.7, 8e-4, 7.0, 1e6),
    "onnxruntime": _Rates(0.09e9, 2.3, 3.6, 0.5, 8e-4, 7.5, 1e6),
}


def estimated(request: Request) -> Estimate:
    """The estimate for one engine."""
    made_of = request.ingredients
    share = _share(request)
    rates, stored = _RATES[made_of.backend], weights_bytes(request) * share
    half, held = request.facts.precision == "fp16", _held_bytes(request)
    repeats = made_of.device.count("+") + max(len(made_of.profiles) - 1, 0)
    nodes = node_count(request.model) * share
    seconds = rates.seconds + rates.seconds_per_node * nodes + rates.seconds_per_gb * held / 1e9
    memory = rates.memory_bytes + (rates.memory_per_half_byte if half else rates.memory_per_byte) * stored
    return Estimate(
        memory_bytes=round(memory),
        build_s=round(seconds * (1 + rates.repeated * repeats), 1),
        size_bytes=estimated_size_bytes(request),
    )


def largest_calls(request: Request) -> Iterator[LargestCall]:
    """The largest call of each profile; none where the graph leaves open what it takes. See `call_of`.

    Raises:
        BundleError: the graph cannot be read.
    """
    from .calls import call_of  # noqa: PLC0415 (onnx, of the extra `engines`)
    from .composed import composed  # noqa: PLC0415
    from .onnxruntime import fuses_attention  # noqa: PLC0415

    made_of = request.ingredients
    graph = composed(request.model, made_of.variant, request.component, hands=made_of.backend in ENGINES_ONLY)
    for tensor in graph.graph.initializer:  # what weights a graph has inside would be copied with it
        if tensor.ByteSize() > _LARGEST_KEPT_BYTES:
            tensor.ClearField("raw_data")
    keeps_scores = made_of.backend == "onnxruntime" and not fuses_attention(made_of.device, made_of.precision)
    there = memory_bytes("MemTotal") if made_of.device == "cpu" else None
    for profile, shapes in request.largest.items():
        call = call_of(graph, shapes, request.component, float_bytes=_float_bytes(made_of), keeps_scores=keeps_scores)
        if call is not None:
            exceeds = there is not None and call.memory_bytes + _held_bytes(request) > there
            yield LargestCall(profile, call.memory_bytes, call.multiply_adds, exceeds)


def _float_bytes(made_of: Ingredients) -> int | None:
    """The bytes of a number while it is computed with, where it is not of the type that the graph states."""
    if made_of.backend in ENGINES_ONLY or made_of.device != "cpu":
        return None
    return 2 if made_of.precision == "bf16" else 4


def estimated_size_bytes(request: Request) -> int:
    """The size of one engine by the estimate, which reads none of the graph."""
    return round(_RATES[request.ingredients.backend].size_bytes + _held_bytes(request))


def _held_bytes(request: Request) -> float:
    """What an engine keeps of the graph's weights."""
    stored = weights_bytes(request) * _share(request)
    # A processor computes in fp32 or, from weights that are kept so, in bf16.
    return stored * 2 if request.facts.precision == "fp16" and request.ingredients.device == "cpu" else stored


def _share(request: Request) -> float:
    """How much of the graph a stage is; an update engine has none of it."""
    variant = request.ingredients.variant
    return 0.0 if variant == UPDATE else 1 / variant.stage[1] if variant.stage else 1.0


def weights_bytes(request: Request) -> int:
    """The size of the graph with all its weights."""
    beside = (request.model.parent / name for name in request.ingredients.weights)
    return sum(path.stat().st_size for path in (request.model, *beside))


def memory_bytes(kind: Literal["MemTotal", "MemAvailable"]) -> int | None:
    """The memory that this machine has, or has left; None where the system does not tell."""
    try:
        lines: Iterable[str] = _MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:")), None)
