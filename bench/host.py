"""The loop's own cost beside diffusers': `python -m tandemrt.bench.host --json FILE`.

Host time per step around a model that answers at once. Take the figures on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .arguments import add_report, add_rounds
from .figures import cell, markdown_table, write_report
from .loops import LATENT_SHAPE, STEPS, step_overheads
from .machine import described, machine_facts
from .program import run_program

GOALS = {"step_overhead_us": 100}


def markdown(facts: dict[str, Any]) -> str:
    """The figures as a Markdown table: medians with the 10th to 90th percentile."""
    rows = [
        [row["solver"], cell(row["tandemrt"], 1), cell(row["diffusers"], 1)] for row in facts["step_overhead"]["rows"]
    ]
    table = markdown_table(("host time per step, µs", "tandemrt", "diffusers"), rows)
    return f"{table}\nMedians, in brackets the 10th to 90th percentile. {described(facts['machine'])}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_report(parser)
    add_rounds(parser, 10, 100, "generations")
    options = parser.parse_args(arguments)
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS}
    shape = {"latent": LATENT_SHAPE, "guidance": True, "steps": STEPS}
    counts = {"warm_up": options.warm_up, "generations": options.repeats}
    facts["step_overhead"] = {**shape, **counts, "rows": step_overheads(options.warm_up, options.repeats)}
    write_report(options.json, facts, markdown(facts))


if __name__ == "__main__":
    run_program(main)
