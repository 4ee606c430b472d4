"""What a machine is made of: processor, memory, operating system, NVIDIA devices."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from ..architecture import INSTRUCTION_SETS, parse_cpuinfo, usable_cpus

NVIDIA_FIELDS = ("name", "compute_cap", "driver_version", "memory.total")
NVIDIA_SMI_TIMEOUT_S = 10.0


def machine_facts() -> dict[str, Any]:
    """Operating system, processor, memory in GiB and NVIDIA devices; what cannot be found out is None."""
    cpuinfo = _text(Path("/proc/cpuinfo"))
    model, flags = parse_cpuinfo(cpuinfo)
    memory = parse_meminfo(_text(Path("/proc/meminfo")))
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": _distribution(),
        "processor": model or platform.processor() or None,
        "cores": os.cpu_count(),
        "usable_cores": usable_cpus(),
        "instruction_sets": {
            precision: [name for name in names if name in flags] for precision, names in INSTRUCTION_SETS.items()
        },
        "memory_gib": memory.get("MemTotal"),
        "available_memory_gib": memory.get("MemAvailable"),
        "nvidia_devices": nvidia_devices(),
    }


def parse_meminfo(text: str) -> dict[str, float]:
    """The entries of /proc/meminfo that are in kB, in GiB."""
    sizes = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            sizes[words[0].rstrip(":")] = round(int(words[1]) / 2**20, 1)
    return sizes


def nvidia_devices() -> list[dict[str, str]]:
    """Name, compute capability, driver version and memory of each NVIDIA device; none where there is no driver."""
    query = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_FIELDS)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return []
    names = [name.replace(".", "_") for name in NVIDIA_FIELDS]
    rows = ([value.strip() for value in line.split(",")] for line in found.stdout.splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
