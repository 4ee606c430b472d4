"""What adaptive guidance costs in accuracy: `python -m tandemrt.bench.adaptive BUNDLE --json FILE`.

BUNDLE is the shapes family's (`tandemrt demo` exports it). Held-out prompts of the family are painted with guidance on
every row, with adaptive guidance at several thresholds, and without guidance, from the same noise. Nothing here is
timed: the figures do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.runtime import Pipeline

from .arguments import add_report, add_threads
from .figures import markdown_table, write_report
from .machine import described, machine_facts
from .program import run_program
from .shapes.scenes import scenes

SEED = 0
LARGE, SMALL = "unet", "unet_small"
# What stands for a mean squared error of 0.
_MOST_DB = 200.0


@dataclass(frozen=True, slots=True)
class Setting:
    """A scale of guidance, the steps of the denoisers, and the thresholds that adaptive guidance is tried with."""

    guidance_scale: float
    steps: Mapping[str, int]
    thresholds: tuple[float, ...]


SETTINGS = tuple(
    Setting(scale, steps, thresholds)
    for scale in (2.0, 5.0, 8.0)
    for steps, thresholds in (({LARGE: 25}, (0.03, 0.05, 0.08)), ({LARGE: 10, SMALL: 15}, (0.05,)))
)


def figures_of(pipe: Pipeline, setting: Setting, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of each threshold, and without guidance: rows with both branches, and squared errors to guidance on every row.

    psnr_db: of the mean of the prompts' errors, of pictures in 0..1. worst_psnr_db: of the largest. rows: the mean.
    """
    shared: dict[str, Any] = {"steps": dict(setting.steps), "seed": SEED, "output_type": "np"}
    fixed = [pipe(prompt, **shared, guidance_scale=setting.guidance_scale) for prompt in prompts]
    for threshold in (*setting.thresholds, None):
        scale = setting.guidance_scale if threshold is not None else 1.0
        rule: dict[str, Any] = {}
        if threshold is not None:
            rule = {"guidance": "adaptive", "guidance_config": {"threshold": threshold}}
        made = [pipe(prompt, **shared, guidance_scale=scale, **rule) for prompt in prompts]
        errors = [float(np.mean(np.square(np.subtract(one.images[0], two.images[0], dtype=np.float64))))
                  for one, two in zip(made, fixed, strict=True)]  # fmt: skip
        yield {
            "guidance_scale": setting.guidance_scale,
            "steps": dict(setting.steps),
            "threshold": threshold,
            "rows": float(np.mean([sum(row.guided for row in one.plan.ran) for one in made])),
            "psnr_db": _psnr_db(float(np.mean(errors))),
            "worst_psnr_db": _psnr_db(max(errors)),
        }


def _psnr_db(squared_error: float) -> float:
    return _MOST_DB if squared_error == 0 else min(_MOST_DB, -10 * float(np.log10(squared_error)))


def table(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown, with what they were measured on below."""
    heads = ("guidance, steps", "threshold", "rows with both branches", "mean, dB", "worst, dB")
    rows = [
        (
            f"{one['guidance_scale']:g}, {'/'.join(map(str, one['steps'].values()))}",
            "no guidance" if one["threshold"] is None else f"{one['threshold']:g}",
            f"{one['rows']:.1f}",
            f"{one['psnr_db']:.1f}",
            f"{one['worst_psnr_db']:.1f}",
        )
        for one in facts["figures"]
    ]
    told = (
        f"{facts['prompts']} held-out prompts, seed {SEED}, `{facts['target']}`; PSNR of their mean squared error to "
        "guidance on every row, and of the largest; steps of the large and the small denoiser."
    )
    return f"{markdown_table(heads, rows)}\n{told} {described(facts['machine'])}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write FILE and a Markdown table beside it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_report(parser)
    parser.add_argument("--target", default="onnxruntime:cpu")
    parser.add_argument("--prompts", type=int, default=6, help="how many held-out prompts (default 6)")
    add_threads(parser)
    options = parser.parse_args(argv)
    prompts = [scene.caption for scene in scenes(SEED, options.prompts, "held_out")]
    facts: dict[str, Any] = {"machine": machine_facts(), "target": options.target, "prompts": len(prompts)}
    with Pipeline.open(options.bundle, options.target, threads=options.threads) as pipe:
        facts["figures"] = [one for setting in SETTINGS for one in figures_of(pipe, setting, prompts)]
    write_report(options.json, facts, table(facts))


if __name__ == "__main__":
    run_program(main)
