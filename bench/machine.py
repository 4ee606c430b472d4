"""What a figure was measured on: processor, memory, operating system, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """Processor, usable cores, memory in GiB, load, system, Python, and the versions of what is installed.

    `load_average` is the one-minute load when asked: a figure taken beside other work is known by it.
    """
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }


def described(facts: dict[str, Any]) -> str:
    """`machine_facts` in one sentence, for the foot of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}, {versions}; load average {facts['load_average']} when it began."
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in _DISTRIBUTIONS}
    return {name: distribution.version for name, distribution in found.items() if distribution is not None}
