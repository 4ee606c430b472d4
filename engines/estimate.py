"""What a build will take, before it starts: memory, time and size, from the weights and the target.

Memory and size are lines through what builds took of the shapes family and of Stable Diffusion 1.5, XL and SDXS at an
eighth of their widths, and TensorRT-RTX's also of Stable Diffusion 1.5's UNet in fp16 at its true size (6.1 GB, 19 s on
two cores). Time is the roughest: it grows with the number of layers too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .plan import Request

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory of the builder's process, its time, and the size of what it leaves."""

    memory_bytes: int
    build_s: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Rates:
    """Of a backend: memory, seconds and size with next to nothing to build, and what a byte, or GB, of weights adds.

    repeated: the share of the time that each further architecture or profile of one engine takes.
    """

    memory_bytes: float
    memory_per_byte: float
    seconds: float
    seconds_per_gb: float
    size_bytes: float
    repeated: float = 0.0


_RATES = {
    "tensorrt-rtx": _Rates(0.45e9, 3.4, 2.0, 10.0, 10e6, 0.3),
    "tensorrt": _Rates(1.5e9, 3.4, 20.0, 150.0, 10e6, 0.8),
    "openvino": _Rates(0.12e9, 4.4, 3.0, 15.0, 1e6),
    "onnxruntime": _Rates(0.09e9, 2.3, 2.0, 12.0, 1e6),
}


def estimated(request: Request) -> Estimate:
    """The estimate for one engine."""
    made_of = request.ingredients
    rates, weights = _RATES[made_of.backend], float(weights_bytes(request))
    if made_of.variant.stage:
        weights /= made_of.variant.stage[1]
    if (made_of.device, made_of.precision) == ("cpu", "fp16"):
        weights *= 2  # a processor computes in fp32, and its engines hold the weights so
    repeats = made_of.device.count("+") + max(len(made_of.profiles) - 1, 0)
    return Estimate(
        memory_bytes=round(rates.memory_bytes + rates.memory_per_byte * weights),
        build_s=round((rates.seconds + rates.seconds_per_gb * weights / 1e9) * (1 + rates.repeated * repeats), 1),
        size_bytes=round(rates.size_bytes + weights),
    )


def weights_bytes(request: Request) -> int:
    """The size of the graph with all its weights."""
    beside = (request.model.parent / name for name in request.ingredients.weights)
    return sum(path.stat().st_size for path in (request.model, *beside))


def memory_available_bytes() -> int | None:
    """The memory that this machine has left, None where the system does not tell."""
    try:
        lines: Iterable[str] = _MEMINFO.read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
