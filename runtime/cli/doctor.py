"""`tandemrt doctor`: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from ..targets import BackendStatus, probe_backends
from .columns import aligned
from .machine import machine_facts
from .reporter import Reporter

EPILOG = """\
example:
  tandemrt doctor

Nothing is changed and nothing is downloaded. Please add the output of `tandemrt doctor --json` to a bug report.
"""
EXPORT_NEEDS = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript")
PACKAGES = ("numpy", "tokenizers", "Pillow", "msgspec", "rich", *EXPORT_NEEDS, "cuda-bindings")


@dataclass(frozen=True, slots=True)
class DoctorPlan:
    """There is nothing to choose."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show this machine's processor, memory and devices, which backends are installed, which targets they can run, "
        "and what is missing for the others, with the command that installs it."
    )
    parser.epilog = EPILOG


def plan_from_arguments(namespace: argparse.Namespace) -> DoctorPlan:
    return DoctorPlan()


def run(plan: DoctorPlan, reporter: Reporter) -> dict[str, Any]:
    """What was found; an installation that is broken is part of that, and no error."""
    versions = {name: _version(name) for name in PACKAGES}
    absent = [name for name in EXPORT_NEEDS if versions[name] is None]
    return {
        "tandemrt": _version("tandemrt"),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "machine": machine_facts(),
        "packages": versions,
        "backends": [_backend_facts(status) for status in probe_backends()],
        "export": {
            "available": not absent,
            "missing": [f'{", ".join(absent)} not installed: pip install "tandemrt[export,cpu]"'] if absent else [],
        },
    }


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    machine, python = result["machine"], result["python"]
    yield f"tandemrt {result['tandemrt']} on {python['implementation']} {python['version']} ({python['executable']})"
    yield from aligned(_machine_table(machine), indent="  ")
    yield ""
    yield "targets that bundles can run on here:"
    runnable = [target for backend in result["backends"] for target in backend["targets"]]
    yield from (f"  {target}" for target in runnable)
    if not runnable:
        yield "  none yet; see what is missing below"
    for backend in result["backends"]:
        yield ""
        name = f"{backend['backend']} {backend['version'] or ''}".rstrip()
        yield from _capability(name, backend["missing"], builds=backend["builds"])
        if backend["devices"]:
            yield f"  here: {', '.join(backend['devices'])}"
    yield ""
    yield from _capability("tandemrt export", result["export"]["missing"])
    yield ""
    installed = (f"{name} {version}" for name, version in result["packages"].items() if version)
    yield f"packages: {', '.join(installed)}"


def _machine_table(machine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "system", ", ".join(filter(None, (machine["system"], machine["distribution"])))
    yield "processor", f"{machine['processor'] or 'unknown'}, {machine['usable_cores']} of {machine['cores']} cores"
    for precision, names in machine["instruction_sets"].items():
        yield f"  {precision}", ", ".join(names) or "no instructions of its own"
    if machine["memory_gib"] is not None:
        yield "memory", f"{machine['memory_gib']} GiB, {machine['available_memory_gib']} GiB of it available"
    for device in machine["nvidia_devices"]:
        yield (
            "NVIDIA",
            (
                f"{device['name']}, compute capability {device['compute_cap']}, {device['memory_total']}, "
                f"driver {device['driver_version']}"
            ),
        )


def _capability(name: str, missing: Sequence[str], *, builds: bool = False) -> Iterator[str]:
    lacking = "builds engines here, does not run them" if builds else "not usable"
    yield f"{name}: {lacking if missing else 'ready'}"
    yield from (f"  {reason}" for reason in missing)


def _backend_facts(status: BackendStatus) -> dict[str, Any]:
    return {**asdict(status), "targets": [str(target) for target in status.targets]}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
