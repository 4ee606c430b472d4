"""The runtime's own cost beside diffusers': `python -m tandemrt.bench.host --bundle DIR --json FILE`.

Per step around an instant model, per import, in memory, and to the first picture. Take the figures on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import markdown_table, write_report
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
        [row["solver"], _cell(row["tandemrt"], 1), _cell(row["diffusers"], 1)] for row in facts["step_overhead"]["rows"]
    ]
    imports = [
        [f"`{row['import']}`", _cell(row["import_s"], 3), _cell(row["import_peak_mib"], 0)]
        for row in facts["imports"]["rows"]
    ]
    parts = [
        markdown_table(("host time per step, µs", "tandemrt", "diffusers"), overheads),
        markdown_table(("import", "seconds", "peak MiB"), imports),
    ]
    if "openings" in facts:
        marks = ("open", "first_picture", "second_picture")
        rows = [
            [row["runtime"], *(_cell(row[f"{mark}_s"], 2) for mark in marks), _cell(row["second_picture_peak_mib"], 0)]
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
    parser.add_argument("--json", type=Path, required=True, help="where the figures go; a .md of the tables beside it")
    parser.add_argument("--warm-up", type=int, default=10, help="generations before the first that counts")
    parser.add_argument("--repeats", type=int, default=100, help="generations that count")
    parser.add_argument("--starts", type=int, default=9, help="fresh interpreters of each kind")
    options = parser.parse_args(arguments)
    facts = host_figures(options.bundle, options.checkpoint, options.warm_up, options.repeats, options.starts)
    write_report(options.json, facts, markdown(facts))


def _cell(figures: dict[str, float], digits: int) -> str:
    return f"{figures['median']:.{digits}f} ({figures['p10']:.{digits}f}–{figures['p90']:.{digits}f})"


if __name__ == "__main__":
    run_program(main)
