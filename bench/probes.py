"""What the machine tells of a contender's turn besides its time: energy, memory on GPUs, the clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.targets import has_nvidia_driver

from . import machine
from .device_memory import DeviceMemory
from .energy import POWERCAP, Meter, Processors
from .nvml import Gpus

PROCESSORS_J, GPUS_J, GPU_MIB = "processors_j", "gpus_j", "gpu_mib"
ENERGY = (PROCESSORS_J, GPUS_J)


class Probes:
    """Meters by the figure they are told as, and GPUs whose memory is looked at; the processors' clock.

    told: what they count and, once, why others do not.
    """

    def __init__(self, meters: Mapping[str, Meter], gpus: Gpus | None = None, told: str = "") -> None:
        self._meters, self.told, self._clocks_mhz = dict(meters), told, list[float]()
        self._memory = None if gpus is None else DeviceMemory(gpus)

    @contextmanager
    def turn(self, pid: int) -> Iterator[dict[str, float]]:
        """The turn of a process; what is yielded has its figures when it is over, in joules and MiB."""
        figures: dict[str, float] = {}
        before = self._read()
        if self._memory is None:
            yield figures
        else:
            with self._memory.turn(pid) as peak:
                yield figures
            figures[GPU_MIB] = peak[0] / 2**20
        figures |= {name: joules - before[name] for name, joules in self._read().items() if name in before}
        # Now, where it still is what the work had it be: of a machine at rest it tells nothing.
        clock = machine.clock_mhz()
        if clock is not None:
            self._clocks_mhz.append(clock)

    @property
    def clock_mhz(self) -> tuple[float, float] | None:
        """The median clock at the ends of the first half of the turns, and of the last; None of fewer than two."""
        if len(self._clocks_mhz) < 2:
            return None
        first, last = np.array_split(self._clocks_mhz, 2)
        return float(np.median(first)), float(np.median(last))

    def _read(self) -> dict[str, float]:
        """Every meter's joules; one that fails is read no more."""
        joules = {}
        for name, meter in tuple(self._meters.items()):
            try:
                joules[name] = meter.joules()
            except BenchmarkError as error:  # noqa: PERF203 (the others go on)
                del self._meters[name]
                self.told += f"; no more after a while: {error}"
        return joules


NO_PROBES = Probes({})


def probes_here(root: Path = POWERCAP) -> Probes:
    """Those of this machine."""
    meters: dict[str, Meter] = {}
    told = []
    try:
        meters[PROCESSORS_J] = processors = Processors(root)
        told.append(f"of all processors ({', '.join(processors.names)})")
    except BenchmarkError as error:
        told.append(f"of the processors not told ({str(error).rstrip('.')})")
    gpus = None
    if has_nvidia_driver():
        try:
            gpus = Gpus()
            gpus.joules()
            meters[GPUS_J] = gpus
            told.append(f"of all {gpus.count} GPUs")
        except BenchmarkError as error:
            told.append(f"of the GPUs not told ({str(error).rstrip('.')})")
    return Probes(meters, gpus, ", ".join(told))
