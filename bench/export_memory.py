"""What exporting an architecture at its true size takes: `python -m tandemrt.bench.export_memory NAME... --json FILE`.

Seconds, peak memory and parity per component, on random weights. Take the figures on a quiet Linux machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.export.plan import PresetPlan
from tandemrt.export.presets import preset_names
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.manifest import Component, Precision

from .arguments import add_report
from .figures import markdown_table, write_json, write_text
from .machine import described, machine_facts
from .memory import in_fresh_process, peak_gib
from .program import run_program

# For SDXL's UNet, SD 1.5's and SD3's transformer in float16.
GOALS = {"unet of sd15": {"peak_gib": 5, "export_s": 60}, "unet of sdxl": {"peak_gib": 12}, "sd3": {"peak_gib": 12}}


class Meter:
    """What each component takes, by the reports of an export's progress.

    rows: by component, `export_s` (read, traced, written), `verify_s` (run here and in PyTorch) and `peak_gib`, the
        peak of resident memory.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self._doing, self._began = "", 0.0

    def __call__(self, message: str, _done: int, _total: int) -> None:
        now, peak = time.perf_counter(), peak_gib()
        name, _, stage = self._doing.partition(": ")
        if name:
            row = self.rows.setdefault(name, {"export_s": 0.0, "verify_s": 0.0, "peak_gib": 0.0})
            row["verify_s" if stage == "verify" else "export_s"] += now - self._began
            row["peak_gib"] = max(row["peak_gib"], peak)
        self._doing, self._began = message, now
        # Lets the kernel forget the peak so far.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def export_figures(name: str, precision: Precision, scratch: Path) -> dict[str, Any]:
    """Export one preset into the folder `scratch`; what that took, as rows that JSON holds."""
    from tandemrt.export.bundle import export_preset  # noqa: PLC0415 — imports torch

    meter = Meter()
    bundle = export_preset(PresetPlan(name, scratch / "bundle", dtype=precision), meter)
    rows = [
        {"component": key, **_facts(component), **meter.rows[key]}
        for key, component in Bundle.open(bundle).manifest.components.items()
    ]
    return {"preset": name, "dtype": precision, "rows": rows}


def markdown(facts: dict[str, Any]) -> str:
    """The figures as one Markdown table."""
    heads = (
        "preset, component",
        "dtype",
        "parameters, M",
        "export, s",
        "verify, s",
        "peak, GiB",
        "parity",
        "fp32 islands",
    )
    rows = [
        [
            f"{export['preset']} {row['component']}",
            export["dtype"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['export_s']:.0f}",
            f"{row['verify_s']:.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['parity']:.1e}",
            str(row["islands"]),
        ]
        for export in facts["exports"]
        for row in export["rows"]
    ]
    note = (
        "Export: from reading the weights to the file; verify: its runs in ONNX Runtime and PyTorch. Memory with the "
        "mapped parts of files; parity is the largest relative error to PyTorch in fp32. Random weights. "
    )
    return markdown_table(heads, rows) + "\n" + note + described(facts["machine"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", choices=preset_names(), metavar="NAME", help="a preset of the export")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp16")
    add_report(parser)
    parser.add_argument("--scratch", type=Path, help="a folder with space for a checkpoint and its bundle")
    options = parser.parse_args(arguments)
    facts = {"machine": machine_facts(), "goals": GOALS, "exports": _kept(options)}
    for name in options.presets:
        with TemporaryDirectory(dir=options.scratch) as scratch:
            facts["exports"].append(in_fresh_process(export_figures, name, options.dtype, Path(scratch)))
        write_json(options.json, facts)
        write_text(options.json.with_suffix(".md"), markdown(facts))
    print(markdown(facts))


def _kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the file holds already of other presets and precisions."""
    if not options.json.exists():
        return []
    before = json.loads(options.json.read_text(encoding="utf-8"))["exports"]
    return [each for each in before if each["dtype"] != options.dtype or each["preset"] not in options.presets]


def _facts(component: Component) -> dict[str, Any]:
    return {
        "parameters": component.parameters,
        "islands": len(component.fp32_islands),
        "parity": max(each.value for each in component.evidence),
        "threshold": max(each.threshold for each in component.evidence),
    }


if __name__ == "__main__":
    run_program(main)
