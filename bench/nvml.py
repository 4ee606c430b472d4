"""NVIDIA's GPUs as its management library tells of them, through the package nvidia-ml-py where it is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tandemrt.runtime.errors import BenchmarkError

MODULE = "pynvml"
_REMEDY = 'Run `pip install "tandemrt[nvml]"`.'


class Gpus:
    """All GPUs of the machine together, whoever uses them."""

    def __init__(self) -> None:
        """Look for them.

        Raises:
            BenchmarkError: the package is not installed, or its library or a GPU is not there.
        """
        try:
            self._nvml: Any = import_module(MODULE)
        except ImportError as error:
            raise BenchmarkError("GPUs", "nvidia-ml-py is not installed", remedy=_REMEDY) from error
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except self._nvml.NVMLError as error:
            raise BenchmarkError("GPUs", f"NVML tells nothing of them ({error})") from error
        if not self._handles:
            raise BenchmarkError("GPUs", "NVML knows none")

    @property
    def count(self) -> int:
        return len(self._handles)

    def joules(self) -> float:
        """What they took since the driver was loaded.

        Raises:
            BenchmarkError: one has no counter of it, as those before Volta.
        """
        try:
            return sum(int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(one)) for one in self._handles) / 1e3
        except self._nvml.NVMLError as error:
            raise BenchmarkError("GPUs", f"NVML does not tell what they take ({error})") from error

    def used_bytes(self) -> int:
        """The memory that is taken on them; 0 where NVML does not tell."""
        try:
            return sum(int(self._nvml.nvmlDeviceGetMemoryInfo(one).used) for one in self._handles)
        except self._nvml.NVMLError:
            return 0

    def used_bytes_by(self, pid: int) -> int:
        """The memory that a process has on them; 0 where NVML does not tell, as in a container with pids of its own."""
        try:
            processes = [one for gpu in self._handles for one in self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
        except self._nvml.NVMLError:
            return 0
        return sum(one.usedGpuMemory or 0 for one in processes if one.pid == pid)
