"""Whether there is room in memory for contenders, told before the system ends one for want of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandemrt.engines.estimate import memory_bytes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.targets import parse_target

from .sizes import stored_bytes


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the models of a picture: parameters that are kept in floating point, and the bytes of quantized models."""

    parameters: int = 0
    quantized_bytes: int = 0

    def held_bytes(self, *, half: bool) -> int:
        """What they take at least, computed with in float32 or as halves."""
        return (2 if half else 4) * self.parameters + self.quantized_bytes

    def held_on(self, target: str) -> int:
        """What TandemRT takes at least on a target; other devices than the processor have memory of their own."""
        parsed = parse_target(target)
        return self.held_bytes(half=parsed.precision == "bf16") if parsed.device == "cpu" else 0


def weights_of(bundle: Bundle, names: Iterable[str]) -> Weights:
    """The weights of components."""
    components = {name: bundle.component(name) for name in names}
    quantized = [name for name, one in components.items() if one.quantization is not None]
    return Weights(
        sum(one.parameters for name, one in components.items() if name not in quantized),
        sum(stored_bytes(bundle, name) for name in quantized),
    )


class Room:
    """The memory that is left, as contenders come; where the system does not tell, there is room for all."""

    def __init__(self) -> None:
        self._left = memory_bytes("MemAvailable")

    def require(self, name: str, needed_bytes: int) -> None:
        """Raise BenchmarkError where what a contender needs does not fit beside those that came before."""
        if self._left is not None and needed_bytes > self._left:
            needed, left = (f"{one / 1e9:.1f} GB" for one in (needed_bytes, max(self._left, 0)))
            what = f"its weights alone take {needed} of memory, and {left} are left beside those before it"
            raise BenchmarkError(name, what, remedy="Measure it beside fewer, or where there is more.")

    def take(self, needed_bytes: int) -> None:
        """Keep what an open contender needs."""
        if self._left is not None:
            self._left -= needed_bytes
