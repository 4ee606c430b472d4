"""The machine as compiled code meets it: the system, the processor's instruction sets, how many CPUs there are."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

# Precision -> instruction sets that speed it up, as Linux names them in /proc/cpuinfo; x86-64 first, then Arm.
INSTRUCTION_SETS = {
    "fp32": ("avx2", "fma", "avx512f", "asimd", "sve", "sve2"),
    "fp16": ("avx512_fp16", "amx_fp16", "asimdhp"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"),
}
_CPUINFO = Path("/proc/cpuinfo")


def parse_cpuinfo(text: str) -> tuple[str | None, frozenset[str]]:
    """The model name and the flags of the first processor in the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name"), frozenset(flags.split())


def system_architecture() -> str:
    """Operating system and kind of machine, such as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


@lru_cache(1)
def cpu_architecture() -> str:
    """The system, the processor and those of its instruction sets that inference code is compiled for."""
    try:
        model, flags = parse_cpuinfo(_CPUINFO.read_text("utf-8", "replace"))
    except OSError:
        model, flags = None, frozenset()
    known = [name for names in INSTRUCTION_SETS.values() for name in names if name in flags]
    return " ".join([system_architecture(), model or platform.processor() or "unknown", *known])


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
