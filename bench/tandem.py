"""Guidance in tandem: `python -m tandemrt.bench.tandem --json FILE ...`.

With `--ways BUNDLE`, what the rows of a guided plan take with the branches batched, one after the other, in parallel,
and with adaptive guidance, and how much of a row is not the model. With `--shapes BUNDLE` also what adaptive guidance
and Hybridiff's window do to the pictures. With `--hybrid BUNDLE` and `--one-step BUNDLE`, whole pictures beside
diffusers doing the same, in interpreters of their own. All ways are taken in turns, and ratios are of the same round.
BUNDLE is what `tandemrt export OUT --preset` makes of `hybrid-sd` and of `sdxs-512-0.9`; take the figures on a quiet
machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.runtime import Output, Pipeline, Timings
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import parse_target

from .arguments import add_report, add_rounds, add_threads
from .figures import cell, markdown_table, spread, write_json, write_report
from .loops import Float32
from .machine import described, machine_facts
from .program import run_program
from .shapes.accuracy import Way, score_ways
from .shapes.scenes import scenes
from .tandem_contenders import COMPILED, EAGER, OURS, Case, Contender

TARGETS = ("onnxruntime:cpu", "openvino:cpu")
BATCHED = "batched"
WAYS: Mapping[str, Mapping[str, Any]] = {
    BATCHED: {},
    "sequential": {"placement": "sequential"},
    "parallel": {"placement": "parallel"},
    "adaptive": {"guidance": "adaptive"},
}
# Of the shapes family: what stands beside guidance on all rows, by the steps of its denoisers.
SHAPES_WAYS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "25/0": {**{name: WAYS[name] for name in (BATCHED, "adaptive")}, "hybridiff": {"placement": "hybridiff"}},
    "10/15": {name: WAYS[name] for name in (BATCHED, "adaptive")},
}
GOALS = {"host_share": 0.01, "hybrid_times_faster": 2.5, "one_step_times_faster": 3.0}
GUIDANCE_SCALE, SHAPES_SEED = 7.0, 0
STAGES = 2


@dataclass(frozen=True, slots=True)
class Options:
    """Rows of a plan, the picture's side, threads of a model, and how many rounds go before and count."""

    rows: int
    size: int
    threads: int | None
    warm_up: int
    repeats: int

    @property
    def seeds(self) -> range:
        """A seed for each round."""
        return range(self.warm_up + self.repeats)


def way_figures(bundle: Path, target: str, options: Options) -> dict[str, Any]:
    """Milliseconds a row of each way of guidance, its ratio to the batched one, and the share that is not the model.

    The first row, which makes the buffers, is left out of the share. host_us: of such a row. psnr_db: of the latents,
    to the batched way's. guided: rows that ran both branches.
    """
    kept: dict[str, list[Output]] = {name: [] for name in WAYS}
    with Pipeline.open(bundle, target, threads=options.threads) as pipe:
        arguments: dict[str, Any] = {"height": options.size, "width": options.size, "output_type": "latent"}
        for seed in options.seeds:
            for name, way in WAYS.items():
                made = pipe(
                    "a red circle left of a blue square",
                    num_inference_steps=options.rows,
                    guidance_scale=GUIDANCE_SCALE,
                    seed=seed,
                    **arguments,
                    **way,
                )
                kept[name] += [made] if seed >= options.warm_up else []
    batched = [made.timings.denoise_ms for made in kept[BATCHED]]
    ways = {}
    for name, outputs in kept.items():
        spent = [made.timings.denoise_ms for made in outputs]
        rows = [row for made in outputs for row in made.timings.rows[1:]]
        distances = [_psnr_db(one.latents, two.latents) for one, two in zip(outputs, kept[BATCHED], strict=True)]
        ways[name] = {
            "row_ms": spread([each / options.rows for each in spent]),
            "ratio": spread(np.divide(spent, batched).tolist()),
            "host_share": spread([1 - row.model_ms / row.total_ms for row in rows]),
            "host_us": spread([(row.total_ms - row.model_ms) * 1e3 for row in rows]),
            "psnr_db": min(distances),
            "guided": spread([_guided(made.timings) for made in outputs]),
        }
    return {"bundle": bundle.name, "target": target, "rows": options.rows, "size": options.size, "ways": ways}


def accuracy_figures(bundle: Path, target: str, prompts: int, options: Options) -> Iterator[dict[str, Any]]:
    """How each way of `SHAPES_WAYS` follows the prompts of the shapes family, and how long it takes beside the first.

    guided: rows that ran both branches.
    """
    chosen = scenes(SHAPES_SEED, prompts, "held_out")
    with TemporaryDirectory() as cache:
        for request in requests_of(
            BuildPlan(bundle, (parse_target(target),), Path(cache), ("unet",), stages=STAGES), Bundle.open(bundle)
        ):
            ensure_engine(request, Path(cache), lambda label, done, total: None, {})
        with Pipeline.open(bundle, target, threads=options.threads, cache=cache) as pipe:
            for plan, asked in SHAPES_WAYS.items():
                large, small = map(int, plan.split("/"))
                steps = {name: count for name, count in (("unet", large), ("unet_small", small)) if count}
                ways = [Way(name, steps, arguments) for name, arguments in asked.items()]
                kept: dict[str, list[Timings]] = {way.name: [] for way in ways}
                for seed in options.seeds:
                    for way in ways:
                        made = pipe(chosen[0].caption, steps=steps, guidance_scale=2.0, seed=seed, **way.arguments)
                        kept[way.name] += [made.timings] if seed >= options.warm_up else []
                spent = {name: [timings.denoise_ms for timings in each] for name, each in kept.items()}
                guided = {name: [_guided(timings) for timings in each] for name, each in kept.items()}
                yield {
                    "target": target,
                    "plan": plan,
                    "rows": len(kept[BATCHED][0].rows),
                    "prompts": prompts,
                    "scores": {name: one.facts() for name, one in score_ways(pipe, chosen, ways, batch=1).items()},
                    "ratio": {name: spread(np.divide(each, spent[BATCHED]).tolist()) for name, each in spent.items()},
                    "guided": {name: spread(counts) for name, counts in guided.items()},
                }


def peer_figures(case: Case, target: str, options: Options, *, compiled: bool) -> dict[str, Any]:
    """Seconds a whole picture of each contender, and how many times this runtime is faster in the same round."""
    kinds = (OURS, EAGER, *((COMPILED,) if compiled else ()))
    contenders: dict[str, Contender] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        for kind in kinds:
            contenders[kind] = Contender(kind, case, target, options.threads)
        for seed in options.seeds:
            for kind, contender in contenders.items():
                taken = contender.seconds(seed)
                seconds[kind] += [taken] if seed >= options.warm_up else []
    finally:
        for contender in contenders.values():
            contender.close()
    faster = {kind: spread(np.divide(seconds[kind], seconds[OURS]).tolist()) for kind in kinds[1:]}
    taken_s = {kind: spread(values) for kind, values in seconds.items()}
    told = {**asdict(case), "bundle": Path(case.bundle).name}
    return {"case": told, "target": target, "seconds": taken_s, "times_faster": faster}


def markdown(facts: dict[str, Any]) -> str:
    """The figures as Markdown tables: medians with the 10th to 90th percentile."""
    parts = []
    if facts["ways"]:
        rows = [
            [
                f"{one['bundle']}, `{one['target']}`: {name}",
                cell(way["row_ms"], 1),
                cell(way["ratio"], 3),
                f"{way['psnr_db']:.0f}",
                f"{way['guided']['median']:g} of {one['rows']}",
                f"{way['host_share']['median']:.2%}",
                cell(way["host_us"], 0),
            ]
            for one in facts["ways"]
            for name, way in one["ways"].items()
        ]
        heads = ("guidance", "a row, ms", "ratio to batched", "PSNR, dB", "rows with both branches")
        parts.append(markdown_table((*heads, "not the model", "not the model, µs"), rows))
    if facts["accuracy"]:
        rows = [
            [
                f"{one['plan']}, `{one['target']}`: {name}",
                f"{score['all_right']['share']:.1%} ({score['all_right']['low']:.1%}–{score['all_right']['high']:.1%})",
                "" if score["psnr_db"] is None else f"{score['psnr_db']:.1f}",
                cell(one["ratio"][name], 3),
                f"{one['guided'][name]['median']:g} of {one['rows']}",
            ]
            for one in facts["accuracy"]
            for name, score in one["scores"].items()
        ]
        heads = ("shapes family", "prompts followed", "PSNR, dB", "ratio to batched", "rows with both branches")
        parts.append(markdown_table(heads, rows))
    if facts["peers"]:
        rows = [
            [
                f"{one['case']['name']}, `{one['target']}`: {kind}",
                cell(taken, 2),
                cell(one["times_faster"][kind], 2) if kind in one["times_faster"] else "",
            ]
            for one in facts["peers"]
            for kind, taken in one["seconds"].items()
        ]
        parts.append(markdown_table(("whole pictures", "seconds", "times tandemrt's"), rows))
    note = "Medians, in brackets the 10th to 90th percentile; ratios are of the same round. "
    return "\n".join([*parts, note + described(facts["machine"]) + "\n"])


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    options = Options(given.rows, given.size, given.threads, given.warm_up, given.repeats)
    targets = given.target or TARGETS
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS, "warm_up": given.warm_up}
    facts |= {"rounds": given.repeats, "ways": [], "accuracy": [], "peers": []}
    cases = _cases(given)
    for case in cases:
        Bundle.open(case.bundle)
    for target in targets:
        facts["ways"] += [way_figures(bundle, target, options) for bundle in given.ways]
        for one in given.shapes:
            facts["accuracy"] += accuracy_figures(one, target, given.prompts, options)
        facts["peers"] += [peer_figures(case, target, options, compiled=given.compile) for case in cases]
        write_json(given.json, facts)
    write_report(given.json, facts, markdown(facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundle: dict[str, Any] = {"type": Path, "metavar": "BUNDLE"}
    add_report(parser)
    parser.add_argument("--ways", action="append", default=[], **bundle, help="a bundle whose first denoiser is timed")
    parser.add_argument("--shapes", action="append", default=[], **bundle, help="the shapes family's bundle")
    parser.add_argument("--hybrid", **bundle, help="SD 1.4 and its small UNet, beside diffusers")
    parser.add_argument("--one-step", **bundle, help="SDXS, beside diffusers")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile too, which takes minutes before")
    parser.add_argument("--steps", type=_steps, default=(10, 15), metavar="N,N", help="of the hybrid (default 10,15)")
    parser.add_argument("--scale", choices=("true", "tiny"), default="true", help="of what diffusers builds")
    parser.add_argument("--target", action="append", help=f"by default {' and '.join(TARGETS)}")
    parser.add_argument("--rows", type=int, default=6, help="rows of the plan whose ways are timed (default 6)")
    parser.add_argument("--size", type=int, default=512, help="the picture's side in pixels (default 512)")
    parser.add_argument("--prompts", type=int, default=300, help="prompts of the shapes family (default 300)")
    add_threads(parser)
    add_rounds(parser, 1, 5)
    return parser


def _cases(given: argparse.Namespace) -> list[Case]:
    scale, size, cases = given.scale, given.size, []
    if given.hybrid is not None:
        (large, small), bundle = given.steps, str(given.hybrid)
        steps, decoder = {"unet": large, "unet_small": small}, "vae_decoder_tiny"
        hybrid = f"hybrid {large}/{small}"
        cases.append(Case(hybrid, bundle, "hybrid-sd", scale, steps, GUIDANCE_SCALE, decoder, size))
    if given.one_step is not None:
        bundle = str(given.one_step)
        cases.append(Case("one step", bundle, "sdxs-512-0.9", scale, {"unet": 1}, 0.0, "vae_decoder", size))
    return cases


def _steps(text: str) -> tuple[int, int]:
    large, small = text.split(",")
    return int(large), int(small)


def _guided(timings: Timings) -> int:
    """How many rows ran both branches."""
    return sum(row.guidance.guided for row in timings.rows)


def _psnr_db(latents: Float32, reference: Float32) -> float:
    """Of latents, whose peak is the reference's largest value; at most 200, which equal ones reach."""
    error = float(np.square(latents.astype(np.float64) - reference).mean())
    peak = float(np.abs(reference).max())
    return 200.0 if error == 0 else min(200.0, 10 * float(np.log10(peak**2 / error)))


if __name__ == "__main__":
    run_program(main)
