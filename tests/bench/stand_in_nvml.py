"""NVIDIA's management library as the package nvidia-ml-py offers it, of GPUs that do as they are told."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest


class NVMLError(Exception):
    """What the package raises."""


@dataclass
class Gpu:
    """A GPU: what it took in millijoules, None where it has no counter; and bytes by the pid of who has them.

    tells_pids: whether NVML knows whose they are.
    """

    energy_mj: int | None = 0
    kept: dict[int, int] = field(default_factory=dict)
    tells_pids: bool = True


class Nvml:
    """The library of these GPUs; with none, of a machine without a driver. looks: how often memory was asked for."""

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus, self.looks = gpus, 0
        self.module = SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=self._init,
            nvmlDeviceGetCount=lambda: len(gpus),
            nvmlDeviceGetHandleByIndex=lambda index: gpus[index],
            nvmlDeviceGetTotalEnergyConsumption=self._energy_mj,
            nvmlDeviceGetMemoryInfo=self._memory,
            nvmlDeviceGetComputeRunningProcesses=self._processes,
        )

    def _init(self) -> None:
        if not self.gpus:
            raise NVMLError("NVML Shared Library Not Found")

    def _energy_mj(self, gpu: Gpu) -> int:
        if gpu.energy_mj is None:
            raise NVMLError("Not Supported")
        return gpu.energy_mj

    def _memory(self, gpu: Gpu) -> SimpleNamespace:
        self.looks += 1
        return SimpleNamespace(used=sum(tuple(gpu.kept.values())))

    def _processes(self, gpu: Gpu) -> list[SimpleNamespace]:
        told = gpu.kept if gpu.tells_pids else {}
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in tuple(told.items())]


def put_in(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> Nvml:
    """Have what imports the package get the stand-in, on a machine with a driver."""
    nvml = Nvml(*gpus)
    monkeypatch.setitem(sys.modules, "pynvml", nvml.module)
    monkeypatch.setattr("tandemrt.bench.probes.has_nvidia_driver", lambda: True)
    return nvml
