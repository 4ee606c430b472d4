"""The runtime's own cost beside diffusers': `python -m tandemrt.bench.host --bundle DIR --json FILE`.

Per step around an instant model, per import, in memory, and to the first picture. Take the figures on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import add_report, add_rounds
from .figures import cell, markdown_table, write_report
from .loops import LATENT_SHAPE, STEPS, step_overheads
from .machine import described, machine_facts
from .program import run_program
from .starts import import_figures, opening_figures

CHECKPOINT = Path(__file__).parent / "shapes" / "weights" / "large"
GOALS = {"step_overhead_us": 100, "import_s": 0.2, "peak_mib_before_a_model": 80}


def host_figures(bundle: Path | None, checkpoint: Path, warm_up: int, repeats: int, starts: int) -> dict[str, Any]:
    """Measure everything; the openings only with a bundle.

    warm_up, repeats: generations of 25 steps around the instant model. starts: fresh interpreters of each kind.
    """
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS}
    facts["imports"] = {"warm_up": 1, "fresh_interpreters": starts, "rows": import_figures(starts)}
    if bundle is not None:
        rows = opening_figures(bundle, checkpoint, starts)
        facts["openings"] = {"warm_up": 1, "fresh_interpreters": starts, "rows": rows}
    rows = step_overheads(warm_up, repeats)
    shape = {"latent": LATENT_SHAPE, "guidance": True, "steps": STEPS}
    facts["step_overhead"] = {**shape, "warm_up": warm_up, "generations": repeats, "rows": rows}
    return facts


def markdown(facts: dict[str, Any]) -> str:
    """The figures as Markdown tables: medians with the 10th to 90th percentile."""
    overheads = [
        [row["solver"], cell(row["tandemrt"], 1), cell(row["diffusers"], 1)] for row in facts["step_overhead"]["rows"]
    ]
    imports = [
        [f"`{row['import']}`", cell(row["import_s"], 3), cell(row["import_peak_mib"], 0)]
        for row in facts["imports"]["rows"]
    ]
    parts = [
        markdown_table(("host time per step, µs", "tandemrt", "diffusers"), overheads),
        markdown_table(("import", "seconds", "peak MiB"), imports),
    ]
    if "openings" in facts:
        marks = ("open", "first_picture", "second_picture")
        rows = [
            [row["runtime"], *(cell(row[f"{mark}_s"], 2) for mark in marks), cell(row["second_picture_peak_mib"], 0)]
            for row in facts["openings"]["rows"]
        ]
        parts.append(
            markdown_table(("seconds from a fresh start", "open", "first picture", "second picture", "peak MiB"), rows)
        )
    note = "Medians, in brackets the 10th to 90th percentile. "
    return "\n".join([*parts, note + described(facts["machine"]) + "\n"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="an exported shapes bundle; without it no opening is measured")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the same weights in diffusers layout")
    add_report(parser)
    add_rounds(parser, 10, 100, "generations")
    parser.add_argument("--starts", type=int, default=9, help="fresh interpreters of each kind")
    options = parser.parse_args(arguments)
    facts = host_figures(options.bundle, options.checkpoint, options.warm_up, options.repeats, options.starts)
    write_report(options.json, facts, markdown(facts))


if __name__ == "__main__":
    run_program(main)
