"""The score table of a shapes bundle: `python -m tandemrt.bench.shapes.score --bundle DIR --json FILE`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.runtime import Pipeline

from ..figures import markdown_table, write_report
from ..machine import described, machine_facts
from ..program import run_program
from .accuracy import GUIDANCE_SCALE, SCENES_SEED, WAYS, Pixels, Progress, Share, score_pictures, score_ways, size_of
from .checker import check
from .decoders import score_decoders
from .mistakes import MISTAKES, with_one_mistake
from .scenes import Scene, render, scenes


def score(
    pipeline: Pipeline, prompts: int = 600, *, batch: int = 32, progress: Progress | None = None
) -> dict[str, Any]:
    """Score everything a shapes bundle can do on its first `prompts` held-out prompts; the result is JSON-able.

    plans: each way to paint. decoders: each decoder on real pictures. checker: what it says about real pictures and
    about pictures with one mistake, of each kind and mixed.
    """
    chosen = scenes(SCENES_SEED, prompts, "held_out")
    manifest = pipeline.bundle.manifest
    facts: dict[str, Any] = {
        "machine": machine_facts(),
        "bundle": {"digest": pipeline.bundle.digest, "target": str(pipeline.target)},
        "prompts": {"count": prompts, "split": "held_out", "scenes_seed": SCENES_SEED, "seeds": "prompt i has seed i"},
        "guidance_scale": GUIDANCE_SCALE,
        "interval": "95% Wilson",
        "psnr": "median over pictures, in dB; plans: to the 25/0 picture of the same noise; decoders: to the render",
    }
    pictures = np.stack([render(scene) for scene in chosen])
    facts["checker"] = score_checker(chosen, pictures)
    facts["decoders"] = score_decoders(pipeline, chosen, pictures, progress=progress)
    results = score_ways(pipeline, chosen, WAYS, batch=batch, progress=progress)
    facts["plans"] = [
        {
            "plan": way.name,
            **results[way.name].facts(),
            **size_of(manifest, [name for name, n in way.steps.items() if n]),
        }
        for way in WAYS
    ]
    return facts


def score_checker(chosen: Sequence[Scene], pictures: Pixels) -> dict[str, Any]:
    """How many real pictures the checker accepts (it should: all) and how many with one mistake (it should: none)."""
    wrong = with_one_mistake(chosen, SCENES_SEED)
    accepted = sum(check(render(painted), asked).all_right for painted, asked in zip(wrong, chosen, strict=True))
    return {
        "real_renders": score_pictures(pictures, chosen).facts(),
        "one_wrong_attribute": {"accepted": Share(accepted, len(chosen)).facts(), "kinds": list(MISTAKES)},
    }


def markdown(facts: dict[str, Any]) -> str:
    """The score as Markdown: plans and checker in one table, decoders in another, what it was measured on below."""
    columns = ("all_right", "one_object", "two_objects", "order_blind")
    heads = ("", "all attributes right", "one object", "two objects", "order-blind", "PSNR to 25/0, dB", "parameters")
    rows = [
        [row["plan"], *(_share(row[name]) for name in columns), _decibels(row["psnr_db"]), f"{row['parameters']:,}"]
        for row in facts["plans"]
    ]
    real, wrong = facts["checker"]["real_renders"], facts["checker"]["one_wrong_attribute"]["accepted"]
    rows.append(["real renders through the checker", *(_share(real[name]) for name in columns), "", ""])
    rows.append(["renders with one wrong attribute, accepted", _share(wrong), "", "", "", "", ""])
    decoders = [
        [
            row["decoder"],
            *(_share(row[name]) for name in columns[:3]),
            _decibels(row["psnr_db"]),
            f"{row['latency_ms']['median']:.1f}",
            f"{row['parameters']:,}",
        ]
        for row in facts["decoders"]
    ]
    decoder_heads = ("encoded and decoded", "all right", "one object", "two objects", "PSNR, dB", "ms", "parameters")
    note = (
        f"{facts['prompts']['count']} held-out prompts, guidance {facts['guidance_scale']:g}, in brackets the "
        f"{facts['interval']} interval; PSNR and ms are medians. {described(facts['machine'])}\n"
    )
    return "\n".join([markdown_table(heads, rows), markdown_table(decoder_heads, decoders), note])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="an exported shapes bundle")
    parser.add_argument("--prompts", type=int, default=600, help="how many held-out prompts")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go; a .md of the tables beside it")
    parser.add_argument("--threads", type=int, help="CPU threads a model may use")
    parser.add_argument("--batch", type=int, default=32, help="prompts painted at once")
    options = parser.parse_args(arguments)
    with Pipeline.open(options.bundle, threads=options.threads) as pipeline:
        facts = score(pipeline, options.prompts, batch=options.batch, progress=_progress_lines())
    write_report(options.json, facts, markdown(facts))


def _progress_lines() -> Progress:
    """Progress to stderr, a line every five seconds at most."""
    spoke = 0.0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > 5:
            spoke = time.monotonic()
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)

    return progress


def _share(facts: dict[str, Any]) -> str:
    if facts["share"] is None:
        return "–"
    return f"{facts['share']:.3f} ({facts['low']:.2f}–{facts['high']:.2f})"


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    run_program(main)
