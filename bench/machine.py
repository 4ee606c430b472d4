"""What a figure was measured on: processor, memory, operating system, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from tandemrt.runtime.cli import machine

_GIT_TIMEOUT_S = 10.0
_DISTRIBUTIONS = (
    "tandemrt",
    "numpy",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "msgspec",
    "Pillow",
    "scipy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
)


def machine_facts() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, NVIDIA devices, load, system, Python, versions of what is installed.

    `load_average` is the one-minute load when asked: a figure taken beside other work is known by it.
    """
    facts = machine.machine_facts()
    return {
        "processor": facts["processor"] or platform.machine(),
        "cores": facts["usable_cores"],
        "memory_gib": facts["memory_gib"],
        "nvidia_devices": facts["nvidia_devices"],
        "load_average": round(os.getloadavg()[0], 2),
        "system": facts["system"],
        "python": platform.python_version(),
        "versions": _versions(),
    }


def clock_mhz() -> float | None:
    """The mean clock of the processors now, as Linux tells it; None where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
    return round(sum(clocks) / len(clocks)) if clocks else None


def described(facts: dict[str, Any]) -> str:
    """`machine_facts` in one sentence, for the foot of a table."""
    devices = "".join(f"{device['name']}, " for device in facts["nvidia_devices"])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {devices}{facts['system']}, "
        f"Python {facts['python']}, {versions}; load average {facts['load_average']} when it began."
    )


def _versions() -> dict[str, str]:
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in _DISTRIBUTIONS}
    versions = {name: distribution.version for name, distribution in found.items() if distribution is not None}
    commit = commit_of(Path(__file__).resolve().parents[1])
    return versions if commit is None else {**versions, "tandemrt's commit": commit}


def commit_of(root: Path) -> str | None:
    """The commit that is checked out in a clone, `-dirty` where files differ from it; None of what is no clone."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.strip() or None
