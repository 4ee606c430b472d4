"""What a build will take, before it starts: memory, time and size, from the weights and the target.

The figures are lines through what builds of the shapes family and of Stable Diffusion 1.5 took on two cores of an AMD
EPYC; they say whether to start, not what will be measured.
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
    """Of a backend: memory with nothing to build; per byte of weights, memory, seconds per GB, and size; for further
    architectures or profiles of one engine, the same share of time and size again."""

    memory_bytes: float
    memory: float
    seconds: float
    seconds_per_gb: float
    size: float
    repeated: float = 0.0


_RATES = {
    "tensorrt-rtx": _Rates(0.3e9, 3.4, 2.0, 11.0, 1.02, 0.3),
    "tensorrt": _Rates(1.5e9, 3.4, 20.0, 150.0, 1.02, 0.8),
    "openvino": _Rates(0.2e9, 4.0, 1.0, 8.0, 1.02),
    "onnxruntime": _Rates(0.1e9, 3.0, 0.5, 4.0, 1.02),
}


def estimated(request: Request) -> Estimate:
    """The estimate for one engine."""
    weights = weights_bytes(request)
    rates = _RATES[request.ingredients.backend]
    repeats = request.ingredients.device.count("+") + max(len(request.ingredients.profiles) - 1, 0)
    more = 1 + rates.repeated * repeats
    return Estimate(
        memory_bytes=round(rates.memory_bytes + rates.memory * weights),
        build_s=round((rates.seconds + rates.seconds_per_gb * weights / 1e9) * more, 1),
        size_bytes=round(rates.size * weights * (more if "+" in request.ingredients.device else 1)),
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
