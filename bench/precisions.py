"""The shapes family in every precision: `python -m tandemrt.bench.precisions BUNDLE --json FILE`.

Its text encoder, UNet and decoder are quantized as `tandemrt calibrate` does it, with trajectories of prompts that the
family was trained on, and pictures of held-out ones are painted in every precision from the same noise: how long one
takes, how near it is to fp32's, whether it shows its prompt, how large the files are and what they take loaded. BUNDLE
is what `make demo` exports. Take the times on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np

from tandemrt.calibrate import collect, quantize_command
from tandemrt.calibrate.guidance_loss import pooled_db
from tandemrt.calibrate.quality import psnr_db
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli.reporter import ConsoleReporter
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.targets import parse_target

from .arguments import add_report, add_rounds, add_threads
from .figures import cell, markdown_table, spread, write_json, write_report
from .machine import described, machine_facts
from .memory import in_fresh_process, resident_mib
from .program import run_program
from .shapes.accuracy import Pixels, Share, Way, generate, paint, size_of
from .shapes.checker import shows
from .shapes.scenes import Split, scenes

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
FLOAT = "float"
FORMATS = ("int8", "int8-weights", "int4-weights")
# The first is what pictures are compared with; of each backend the first is what its times are compared with.
CASES = (
    *(("onnxruntime:cpu", form) for form in (FLOAT, *FORMATS)),
    ("openvino:cpu", FLOAT),
    ("openvino:cpu:bf16", FLOAT),
    *(("openvino:cpu", form) for form in FORMATS),
    ("openvino:cpu:bf16", "int8-weights"),
)
GOALS = {"int8_right_points_below_fp32": 1}
STEPS, CALIBRATION_PROMPTS = 10, 8

Case = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Options:
    """Held-out prompts, steps of a picture, threads of a model, pictures of each case before and that are timed."""

    prompts: int
    steps: int
    threads: int | None
    warm_up: int
    repeats: int

    @property
    def way(self) -> Way:
        """How a picture is painted."""
        return Way("large", {"unet": self.steps})


def captions(count: int, split: Split) -> tuple[str, ...]:
    """So many captions of a split, each once; always the same ones.

    Raises:
        ArgumentError: there are not so many.
    """
    found = tuple(dict.fromkeys(scene.caption for scene in scenes(0, 4 * count, split)))
    if len(found) < count:
        raise ArgumentError(
            "captions", f"of the {split} split, each once", got=count, expected=f"{len(found)} or fewer"
        )
    return found[:count]


def collected(bundle: Path, folder: Path, steps: int, prompts: int = CALIBRATION_PROMPTS) -> Path:
    """Trajectories of the UNet, text encoder and decoder, by prompts of the training split.

    Raises:
        TandemError: the bundle cannot be used, or the folder not be written.
    """
    file = folder / "train.txt"
    file.write_text("\n".join(captions(prompts, "train")), encoding="utf-8")
    named = ("--prompts", file, "--steps", steps, "--denoiser", "unet", "--target", "onnxruntime:cpu")
    _run(collect, bundle, "--out", folder / "trajectories", *named)
    return folder / "trajectories"


def quantized(bundle: Path, trajectories: Path, out: Path, form: str) -> Path:
    """A bundle with the components that a picture takes in one of the formats, no layer kept for a budget.

    Raises:
        TandemError: the bundle or the trajectories cannot be used, or `out` not be written.
    """
    named = [word for name in COMPONENTS for word in ("--component", name)]
    # One step of no prompt shows that it paints; how well is not asked here.
    settings = ("--format", form, *named, "--steps", 1, "--cache", out.parent)
    _run(quantize_command, bundle, "--out", out, "--trajectories", trajectories, *settings)
    return out


def picture_facts(pictures: Pixels, meant: Pixels, prompts: Sequence[str]) -> dict[str, Any]:
    """How near pictures, (B, 64, 64, 3) uint8, are to those of the same noise, and how many show their prompts.

    psnr_db: of the mean of all squared errors, which the few pictures decide that come out another way; at most 99.
    """
    each = [psnr_db(picture, reference) for picture, reference in zip(pictures, meant, strict=True)]
    return {
        "psnr_db": pooled_db(each, len(each)),
        "median_psnr_db": float(np.median(each)),
        "worst_psnr_db": min(each),
        "right": Share(sum(shows(prompts, pictures)), len(prompts)).facts(),
        "points_below_fp32": 100 * (sum(shows(prompts, meant)) - sum(shows(prompts, pictures))) / len(prompts),
    }


def time_facts(pipelines: Mapping[Case, Pipeline], prompts: Sequence[str], options: Options) -> dict[Case, Any]:
    """Milliseconds a picture of each case, text and decoder in it, painted in turns; ratios to the first's."""
    taken: dict[Case, list[float]] = {case: [] for case in pipelines}
    for round_ in range(options.warm_up + options.repeats):
        for case, pipeline in pipelines.items():
            made = generate(pipeline, options.way, [prompts[round_ % len(prompts)]], [round_])
            if round_ >= options.warm_up:
                taken[case].append(made.timings.total_ms)
    first = next(iter(taken.values()))
    return {
        case: {"picture_ms": spread(each), "of_fp32": spread(np.divide(each, first).tolist())}
        for case, each in taken.items()
    }


def loaded_mib(bundle: Path, target: str, prompt: str, options: Options) -> float:
    """What this process grows by when it opens a bundle and paints a picture; for one that did nothing else."""
    imported(parse_target(target).backend)
    before = resident_mib()
    with Pipeline.open(bundle, target, threads=options.threads) as pipeline:
        generate(pipeline, options.way, [prompt], [0])
        return resident_mib() - before


def case_rows(bundles: Mapping[str, Path], cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """The figures of each case; the bundles by format."""
    prompts = captions(options.prompts, "held_out")
    meant: Pixels | None = None
    for backend in dict.fromkeys(parse_target(target).backend for target, _ in cases):
        with ExitStack() as stack:
            pipelines = {
                (target, form): stack.enter_context(Pipeline.open(bundles[form], target, threads=options.threads))
                for target, form in cases
                if parse_target(target).backend == backend
            }
            times = time_facts(pipelines, prompts, options)
            for (target, form), pipeline in pipelines.items():
                pictures = paint(pipeline, options.way, prompts)
                meant = pictures if meant is None else meant
                yield {
                    "target": target,
                    "format": form,
                    **times[target, form],
                    **picture_facts(pictures, meant, prompts),
                    "megabytes": size_of(pipeline.bundle.manifest, COMPONENTS)["megabytes"],
                    "loaded_mib": in_fresh_process(loaded_mib, bundles[form], target, prompts[0], options),
                }


def markdown(facts: dict[str, Any]) -> str:
    """The figures as a Markdown table, what they were measured with below."""
    rows = [
        [
            f"`{row['target']}`, {row['format']}",
            cell(row["picture_ms"], 0),
            cell(row["of_fp32"], 2),
            "" if index == 0 else f"{row['psnr_db']:.1f}",
            "" if index == 0 else f"{row['median_psnr_db']:.1f}",
            "" if index == 0 else f"{row['worst_psnr_db']:.1f}",
            f"{row['right']['share']:.1%} ({row['right']['low']:.1%}–{row['right']['high']:.1%})",
            f"{row['megabytes']:.1f}",
            f"{row['loaded_mib']:.0f}",
        ]
        for index, row in enumerate(facts["rows"])
    ]
    heads = ("", "a picture, ms", "of fp32's time", "PSNR, dB", "median", "worst", "right", "files, MB", "loaded, MiB")
    made = ", ".join(f"{form} {seconds:.0f}" for form, seconds in facts["seconds"].items())
    note = (
        f"\n{facts['prompts']} held-out prompts, {facts['steps']} steps. Times: medians of {facts['rounds']} pictures "
        "painted one by one and in turns, in brackets the 10th to 90th percentile, and shares of what fp32 took on the "
        "same backend in the same round. PSNR to the first row's pictures: of the mean of all squared errors, of the "
        "median and of the worst picture. Right: in brackets the 95% Wilson interval. Loaded: what a fresh process "
        f"grows by until its first picture. Seconds to calibrate: {made}. "
    )
    return markdown_table(heads, rows) + note + described(facts["machine"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    options = Options(given.prompts, given.steps, given.threads, given.warm_up, given.repeats)
    cases = [case for case in CASES if not given.only or case in given.only]
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS, "bundle": Bundle.open(given.bundle).digest}
    facts |= {"prompts": given.prompts, "steps": given.steps, "rounds": given.repeats, "seconds": {}, "rows": []}
    with TemporaryDirectory(dir=given.scratch) as scratch:
        began = time.perf_counter()
        trajectories = collected(given.bundle, Path(scratch), given.steps)
        facts["seconds"]["trajectories"] = time.perf_counter() - began
        bundles = {FLOAT: given.bundle}
        for form in dict.fromkeys(form for _, form in cases if form != FLOAT):
            began = time.perf_counter()
            bundles[form] = quantized(given.bundle, trajectories, Path(scratch, form), form)
            facts["seconds"][form] = time.perf_counter() - began
        for row in case_rows(bundles, cases, options):
            facts["rows"].append(row)
            write_json(given.json, facts)
    write_report(given.json, facts, markdown(facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the shapes family's, in fp32")
    add_report(parser)
    row = "a row of the table, such as openvino:cpu,int8; again for more (default: all)"
    parser.add_argument("--only", type=_case, action="append", choices=CASES, metavar="TARGET,FORMAT", help=row)
    parser.add_argument("--prompts", type=int, default=208, help="how many held-out prompts (default 208)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a picture (default {STEPS})")
    add_threads(parser)
    add_rounds(parser, 2, 25, "pictures")
    parser.add_argument("--scratch", type=Path, help="a folder with space for the quantized bundles")
    return parser


def _case(text: str) -> Case:
    target, _, form = text.partition(",")
    return target, form


def _run(command: ModuleType, *words: object) -> None:
    """Run a command of `tandemrt calibrate`, which speaks on stderr."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    plan = command.plan_from_arguments(parser.parse_args([str(word) for word in words]))
    with ConsoleReporter(sys.stderr, sys.stderr) as reporter:
        command.run(plan, reporter)


if __name__ == "__main__":
    run_program(main)
