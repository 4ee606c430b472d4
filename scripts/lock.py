"""Resolve the project with its extras on several Pythons; write the union as constraints.txt.

`python3 scripts/lock.py EXTRAS PYTHON...`, interpreters from oldest to newest. A version that only some of them get
carries a `python_version` marker; the newest interpreter's version also holds for every Python after it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Moved on purpose only: a new torch wants the export and parity figures measured anew.
HELD = ("torch==2.13.0",)
# Reached only through PyPI's CUDA build of torch, which pins them itself.
CUDA_PACKAGES = re.compile(r"^(nvidia-|cuda-toolkit$|triton$)")


def resolved_versions(python: str, extras: str) -> dict[str, str]:
    """Ask pip on `python` what it would install, by normalized name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        in_venv = str(Path(folder, "venv", "bin", "python"))
        subprocess.run([python, "-m", "venv", Path(folder, "venv")], check=True)
        subprocess.run([in_venv, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        wanted = ["pip", *HELD, f"{ROOT}[{extras}]"]
        resolve = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *wanted]
        subprocess.run([in_venv, "-m", "pip", *resolve], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    named = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"].partition("+")[0] for item in found}
    return {name: version for name, version in named.items() if name != "tandemrt" and not CUDA_PACKAGES.match(name)}


def python_version(python: str) -> str:
    """Minor version of an interpreter, such as `3.10`."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def constraint_lines(name: str, versions: Sequence[str | None], pythons: Sequence[str]) -> list[str]:
    """Lines for one package; `versions[i]` is what `pythons[i]` gets, None where it gets none."""
    lines = []
    start = 0
    for end in range(1, len(versions) + 1):
        if end < len(versions) and versions[end] == versions[start]:
            continue
        bounds = [f'python_version >= "{pythons[start]}"'] if start else []
        bounds += [f'python_version < "{pythons[end]}"'] if end < len(versions) else []
        if versions[start] is not None:
            lines.append(f"{name}=={versions[start]}" + (f" ; {' and '.join(bounds)}" if bounds else ""))
        start = end
    return lines


def constraints_text(resolutions: Mapping[str, Mapping[str, str]], extras: str) -> str:
    """The file's text from the resolution of each Python version, oldest first."""
    pythons = list(resolutions)
    names = sorted({name for versions in resolutions.values() for name in versions})
    header = f"# Versions that `make` installs for tandemrt[{extras}]; written by `make lock`, not by hand."
    lines = [
        line
        for name in names
        for line in constraint_lines(name, [versions.get(name) for versions in resolutions.values()], pythons)
    ]
    return "\n".join([header, *lines]) + "\n"


if __name__ == "__main__":
    extras, *interpreters = sys.argv[1:]
    resolutions = {python_version(python): resolved_versions(python, extras) for python in interpreters}
    Path(ROOT, "constraints.txt").write_text(constraints_text(resolutions, extras), encoding="utf-8")
