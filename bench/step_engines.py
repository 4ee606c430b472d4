"""Step engines beside the plain loop: `python -m tandemrt.bench.step_engines --json FILE ...`.

What the graphs lose in nodes and weights when time steps are folded, and what a step takes in four ways, in turns in
one run: the loop around the denoiser, a step engine, one with its time steps folded, and one with LoRA slots that hold
a LoRA of full rank. DIR is a denoiser's folder in a bundle: `unet` of `tandemrt export OUT --preset sdxs-512-0.9`, and
of `--preset bk-sdm-tiny`. Take the figures on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tandemrt.engines.fold import folded
from tandemrt.engines.graph_files import read_graph, write_graph
from tandemrt.engines.slots import lora_slots
from tandemrt.engines.step import step_graph
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Session
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.engine_files import GRAPH_NAME
from tandemrt.runtime.lora_slots import Adapter, LowRank, slot_widths
from tandemrt.runtime.onnx_files import graph_tensors
from tandemrt.runtime.placement import Batched, Worker
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.rows import Rows
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.solvers import compile_table
from tandemrt.runtime.state import State
from tandemrt.runtime.step_sampler import StepEngine, StepSampler
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.tensors import latent_names
from tandemrt.runtime.variant import Variant

from .arguments import add_report, add_rounds, add_threads
from .figures import cell, markdown_table, spread, write_report
from .loops import SCHEDULE, Float32, normal
from .machine import described, machine_facts
from .program import run_program

TARGETS = ("onnxruntime:cpu:fp32", "openvino:cpu:fp32")
STEPS, GUIDANCE_SCALE, TOKENS = 25, 7.5, 77
LORA_SLOTS, LORA_RANK = 2, 16
LOOP, FUSED, FOLDED, SLOTTED = (
    "loop around the denoiser",
    "step engine",
    "step engine, folded",
    "step engine, LoRA slots",
)
_UNET = "unet"


@dataclass(frozen=True, slots=True)
class Case:
    """A denoiser's folder, the plan it runs, and how many of the plan's rows are timed."""

    name: str
    folder: Path
    plan: Plan
    rows: int

    @property
    def guided(self) -> bool:
        """Whether both branches run."""
        return self.plan.guided[0]


@dataclass(frozen=True, slots=True)
class Options:
    """Height and width of the latent, threads of a model, and how many rounds go before and count."""

    latent: int
    threads: int | None
    warm_up: int
    repeats: int


def one_step_case(folder: Path) -> Case:
    """SDXS's one step: time step 999, no guidance."""
    table = compile_table("DDIMScheduler", {**SCHEDULE, "timestep_spacing": "trailing", "clip_sample": False}, 1)
    return Case("one step", folder, Plan(table, (_UNET,), (False,), 0.0), 1)


def schedule_case(folder: Path, rows: int) -> Case:
    """25 steps of DPM-Solver++ 2M under guidance, the first `rows` of them timed."""
    table = compile_table("DPMSolverMultistepScheduler", SCHEDULE, STEPS)
    plan = Plan(table, (_UNET,) * table.rows, (True,) * table.rows, GUIDANCE_SCALE)
    return Case(f"{STEPS} steps, guided", folder, plan, rows)


def case_figures(case: Case, targets: Sequence[str], options: Options, scratch: Path) -> dict[str, Any]:
    """Nodes and weights of the case's graphs, and milliseconds a step on each target."""
    whole = read_graph(case.folder / GRAPH_NAME)
    timesteps = tuple(dict.fromkeys(case.plan.table.timesteps.tolist()))
    few = folded(whole, timesteps, case.folder)
    graphs = {
        "denoiser": whole,
        "denoiser, folded": few,
        FUSED: step_graph(whole, guided=case.guided),
        FOLDED: step_graph(few, guided=case.guided),
        SLOTTED: step_graph(lora_slots(whole, slots=LORA_SLOTS, rank=LORA_RANK), guided=case.guided),
    }
    sizes = {
        name: {
            "nodes": len(graph.graph.node),
            "weights": int(sum(np.prod(tensor.dims, dtype=np.int64) for tensor in graph.graph.initializer)),
        }
        for name, graph in graphs.items()
    }
    models = {LOOP: case.folder / GRAPH_NAME}
    for index, name in enumerate((FUSED, FOLDED, SLOTTED)):
        models[name] = write_graph(graphs[name], scratch / str(index), case.folder)
    timings = [_timed(case, target, models, timesteps, options) for target in targets]
    latent = [1, *_latent_shape(case.folder, options.latent)[1:]]
    return {"case": case.name, "latent": latent, "rows_timed": case.rows, "graphs": sizes, "timings": timings}


def markdown(facts: dict[str, Any]) -> str:
    """The figures as Markdown tables: medians with the 10th to 90th percentile."""
    graphs = [
        [f"{case['case']}: {name}", str(size["nodes"]), f"{size['weights']:,}"]
        for case in facts["cases"]
        for name, size in case["graphs"].items()
    ]
    steps = [
        [
            f"{case['case']}, `{timing['target']}`",
            cell(timing["step_ms"][LOOP], 0),
            *(cell(timing["ratios"][name], 3) for name in (FUSED, FOLDED, SLOTTED)),
        ]
        for case in facts["cases"]
        for timing in case["timings"]
    ]
    note = "Medians, in brackets the 10th to 90th percentile; ratios to the loop's time in the same round. "
    return "\n".join(
        [
            markdown_table(("graph", "nodes", "weights"), graphs),
            markdown_table(("a step", f"{LOOP}, ms", *(f"{name}, ratio" for name in (FUSED, FOLDED, SLOTTED))), steps),
            note + described(facts["machine"]) + "\n",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-step", type=Path, metavar="DIR", help="a one-step model's folder")
    parser.add_argument("--schedule", type=Path, metavar="DIR", help="the folder of a model of many steps")
    add_report(parser)
    parser.add_argument("--target", action="append", help=f"by default {' and '.join(TARGETS)}")
    parser.add_argument("--latent", type=int, default=64, help="height and width of the latent")
    parser.add_argument("--rows", type=int, default=2, help="steps of the schedule that are timed")
    add_threads(parser)
    add_rounds(parser, 1, 9)
    parser.add_argument("--scratch", type=Path, help="a folder with space for a copy of the weights for each graph")
    given = parser.parse_args(arguments)
    cases = [one_step_case(given.one_step)] if given.one_step else []
    cases += [schedule_case(given.schedule, given.rows)] if given.schedule else []
    options = Options(given.latent, given.threads, given.warm_up, given.repeats)
    lora = {"slots": LORA_SLOTS, "rank": LORA_RANK}
    rounds = {"warm_up": given.warm_up, "rounds": given.repeats}
    facts: dict[str, Any] = {"machine": machine_facts(), **rounds, "lora": lora, "cases": []}
    with TemporaryDirectory(dir=given.scratch) as scratch:
        for index, case in enumerate(cases):
            figures = case_figures(case, given.target or TARGETS, options, Path(scratch, str(index)))
            facts["cases"].append(figures)
    write_report(given.json, facts, markdown(facts))


def _timed(
    case: Case, target: str, models: dict[str, Path], timesteps: Sequence[float], options: Options
) -> dict[str, Any]:
    """Each way beside the loop; no more than the two models are loaded, since four of true size took over 20 GB."""
    figures: dict[str, Any] = {"target": target, "step_ms": {}, "ratios": {}, "max_relative_difference": {}}
    loops: list[float] = []
    for name in (FUSED, FOLDED, SLOTTED):
        loop, way = (open_session(models[one], parse_target(target), threads=options.threads) for one in (LOOP, name))
        taken, difference = _pair(case, loop, way, timesteps if name == FOLDED else (), options)
        loop.close()
        way.close()
        loops += taken[0]
        figures["step_ms"][name] = spread(taken[1])
        figures["ratios"][name] = spread(np.divide(taken[1], taken[0]).tolist())
        figures["max_relative_difference"][name] = difference
    figures["step_ms"][LOOP] = spread(loops)
    return figures


def _pair(
    case: Case, loop: Session, way: Session, timesteps: Sequence[float], options: Options
) -> tuple[tuple[list[float], list[float]], float]:
    """Milliseconds a step of the loop and of a step engine, round by round, and how far their latents are apart."""
    shape, key, branch = _latent_shape(case.folder, options.latent), (_UNET, case.guided), _conditioning(case.folder)
    begun = normal(shape) * np.float32(case.plan.table.init_noise_sigma)
    variant = Variant(step="guided" if case.guided else "unguided", timesteps=tuple(timesteps))
    samplers = (
        Sampler(
            case.plan, Batched(Worker(case.plan, {_UNET: loop}, {_UNET: Conditioning(branch, branch)})), begun.copy
        ),
        StepSampler(Rows(case.plan, {_UNET: _with_lora(branch, way)}, begun.copy), {key: StepEngine(way, variant)}),
    )
    steps: tuple[list[float], list[float]] = ([], [])
    for round_ in range(options.warm_up + options.repeats):
        latents = []
        for sampler, kept in zip(samplers, steps, strict=True):
            state = State.begin(case.plan.table, begun)
            taken = [done.total_ms for done in sampler.run(state, case.rows)]
            latents.append(state.latents.copy())
            if round_ >= options.warm_up:
                kept.append(sum(taken) / len(taken))
    return steps, float(np.abs(latents[1] - latents[0]).max() / np.abs(latents[0]).max())


def _latent_shape(folder: Path, side: int) -> tuple[int, int, int, int]:
    inputs, _ = graph_tensors(folder / GRAPH_NAME)
    latent = latent_names(inputs).sample
    (channels,) = (int(spec.shape[1]) for spec in inputs if spec.name == latent)
    return 1, channels, side, side


def _conditioning(folder: Path) -> dict[str, Float32]:
    inputs, _ = graph_tensors(folder / GRAPH_NAME)
    sizes: dict[int | str, int] = {"batch": 1, "sequence": TOKENS}
    return {
        spec.name: normal(tuple(int(sizes.get(size, size)) for size in spec.shape))
        for spec in inputs
        if spec.name not in (latent_names(inputs).sample, "timestep")
    }


def _with_lora(branch: dict[str, Float32], session: Session) -> Conditioning:
    """Small changes of rank LORA_RANK for every module that has slots, if any, in the first of them."""
    changes = {
        module: LowRank(normal((LORA_RANK, read)) * np.float32(1e-2), normal((made, LORA_RANK)) * np.float32(1e-2))
        for module, (read, made) in slot_widths(session.inputs).items()
    }
    return Conditioning(branch, branch, adapters=(Adapter("random", changes),) if changes else ())


if __name__ == "__main__":
    run_program(main)
