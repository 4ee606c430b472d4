"""What the machine's processors take, in joules, as Linux tells it of counters that they have themselves.

RAPL's, which Intel's and AMD's processors have: of whole packages, and of the memory beside them where that is counted
by itself. On most machines none but root may read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandemrt.runtime.errors import BenchmarkError

POWERCAP = Path("/sys/class/powercap")
# Further zones are parts of these, or, as `psys`, hold them.
_PACKAGE, _MEMORY = "package", "dram"


class Meter(Protocol):
    """A counter of energy."""

    def joules(self) -> float:
        """What was taken since some moment; only differences say something. BenchmarkError where it cannot be read."""


class Processors:
    """The packages of the machine's processors, with their memory where that is told; see `Meter`.

    Counters begin anew at the end of their range, after minutes to hours: that is seen where no more than a range lies
    between two looks.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        """Find the zones that count.

        Raises:
            BenchmarkError: there is none, or it may not be read.
        """
        # Those of `intel-rapl-mmio` are the same packages again.
        zones = [(zone, _text(zone / "name")) for zone in sorted(root.glob("intel-rapl:*"))]
        found = [(zone, name) for zone, name in zones if name.startswith(_PACKAGE) or name == _MEMORY]
        if not any(name.startswith(_PACKAGE) for _, name in found):
            raise BenchmarkError(str(root), "has no counter of a processor's energy")
        self.names = tuple(name for _, name in found)
        self._counters = [_Counter(zone / "energy_uj", int(_text(zone / "max_energy_range_uj"))) for zone, _ in found]
        self.joules()

    def joules(self) -> float:
        """What they took since the first look."""
        return sum(counter.taken_uj() for counter in self._counters) / 1e6


@dataclass(slots=True)
class _Counter:
    """A zone's counter in microjoules, and what it came to since the first look."""

    file: Path
    range_uj: int
    last_uj: int | None = None
    total_uj: int = 0

    def taken_uj(self) -> int:
        """What was taken since the first look."""
        now = int(_text(self.file))
        if self.last_uj is not None:
            self.total_uj += now - self.last_uj + (self.range_uj if now < self.last_uj else 0)
        self.last_uj = now
        return self.total_uj


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError as error:
        remedy = "Root may read it, and others whom root lets." if isinstance(error, PermissionError) else ""
        raise BenchmarkError(str(file), f"cannot be read ({error.strerror})", remedy=remedy) from error
