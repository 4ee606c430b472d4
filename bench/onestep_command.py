"""`tandemrt bench onestep`: what a picture of one step takes, component by component."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.targets import parse_target

from .components import component_entrant, file_figure, inputs_of, save_inputs
from .entrants import own_entrant, own_name
from .memory import in_fresh_process
from .part_sections import LIMIT_NOTE, peaks_section
from .picture_limits import PictureLimits, add_limits, limits_by_target, machine_options, rates_by_target
from .published import opened, plan_facts, publish, summary
from .reports.schema import Column, Figure, Plot, Row, Section, Unit
from .rounds import Taken, in_rounds
from .sections import otherwise
from .seen import seen_columns, seen_figures, seen_note
from .shared_arguments import BUNDLES, Shared, add_shared, shared_from

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]

WHOLE = "the whole picture"
NOTE = (
    "A component is alone in a process and is given what it was given in a picture; the peak is of that process's "
    "resident memory, the interpreter's among it. The whole picture is painted by another process in the same rounds, "
    "from the prompt to the pixels, with the tokenizer, noise and solver."
)


@dataclass(frozen=True, slots=True)
class OneStepPlan:
    """Which denoiser runs the step, and which decoder; None stands for the bundle's.

    limits: whether what the machine does at best is measured too.
    """

    shared: Shared
    steps: str | None
    decoder: str | None
    limits: bool

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        decoder = self.decoder or "the bundle's first"
        return {**self.shared.facts, "steps": self.steps or BUNDLES, "decoder": decoder}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench onestep`."""
    parser.description = (
        "Measure text encoder, denoiser and decoder of a one-step model such as SDXS: latency and memory of each, "
        "beside the whole picture, in the same rounds."
    )
    parser.epilog = """\
examples:
  tandemrt bench onestep --preset sdxs-512-0.9 --target openvino:cpu:bf16 --target onnxruntime:cpu --out onestep/
  tandemrt bench onestep bundle/ --steps unet_one_step:1 --guidance-scale 0 --out onestep/
"""
    add_shared(parser)
    how = parser.add_argument_group("how it is painted")
    how.add_argument(
        "--steps", metavar="NAME:1", help="the denoiser that runs the step, unet:1 (default: the bundle's)"
    )
    how.add_argument("--decoder", metavar="NAME", help="default: the bundle's first")
    add_limits(parser)


def plan_from_arguments(namespace: argparse.Namespace) -> OneStepPlan:
    """The command line as a plan. ArgumentError: an option's value cannot be used."""
    return OneStepPlan(shared_from(namespace), namespace.steps, namespace.decoder, namespace.limits)


def run(plan: OneStepPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: the plan has several steps, TandemRT failed on the first target, or the report's folder is taken
            or cannot be written.
        BundleError, ExportError, PlanError, RequestError: as `bench run`.
    """
    shared = plan.shared
    measured = opened(shared, reporter)
    compiled = measured.plan(shared, plan.steps)
    _require_one_step(measured.bundle, compiled)
    work = measured.work(shared, compiled, plan.decoder)
    held, guided = shared.targets if plan.limits else (), any(compiled.guided)
    options = machine_options(shared.threads)
    before, untold = rates_by_target(work, held, options, reporter.progress)
    with TemporaryDirectory() as folder:
        reporter.progress("paint what components are given", 0, 1)
        names = in_fresh_process(save_inputs, work, shared.targets[0], (shared.rounds.seed,), Path(folder))
        reporter.progress("paint what components are given", 1, 1)
        entrants = {own_name(target): own_entrant(work, target) for target in shared.targets}
        entrants |= {
            f"{name} on {target}": component_entrant(work, measured.bundle, name, target, inputs_of(name, Path(folder)))
            for target in shared.targets
            for name in names
        }
        Path(folder, "pictures").mkdir()
        taken = in_rounds(entrants, shared.rounds, Path(folder, "pictures"), reporter.progress, measured.watch.probes)
    limits, unsteady = limits_by_target(work, before, options, reporter.progress, guided=guided)
    whole = {target: taken[own_name(target)] for target in shared.targets}
    sections = [
        _section(measured.bundle, target, {name: taken[f"{name} on {target}"] for name in names}, one)
        for target, one in whole.items()
    ]
    sections = [_beside(section, limits.get(target)) for section, target in zip(sections, whole, strict=True)]
    sections += [peaks_section(limits)] if limits else []
    told = (*otherwise(taken), *untold, *unsteady)
    return publish("one step", shared, measured, work.resolved(plan.facts), sections, told)


def _require_one_step(bundle: Bundle, plan: Plan) -> None:
    """Raise BenchmarkError for a plan of more than a step, with what would be one."""
    if sum(count for _, count in plan.steps) == 1:
        return
    got = ", ".join(f"{name} {count}" for name, count in plan.steps)
    ways = " or ".join(f"--steps {name}:1" for name in bundle.manifest.names("denoiser"))
    remedy = f"Ask for {ways}; `tandemrt bench run` measures plans of more."
    raise BenchmarkError(bundle.path.name, "steps of its plan", got=got, expected="one", remedy=remedy)


def _section(bundle: Bundle, target: str, taken: Mapping[str, Taken], whole: Taken) -> Section:
    """The components' rows and the whole picture's, on a target."""
    rows = []
    for name, one in taken.items():
        component = bundle.component(name)
        own = parse_target(target).of_component(component)
        words = {"precision": own.precision or component.computes_in}
        figures = {"file": file_figure(bundle, name, one)}
        if one.rounds:
            calls = one.samples("call_s")
            words["ran"] = one.rounds[-1].words[name]
            figures |= _times(one, calls)
            if whole.rounds:
                shares = tuple(call / all_ for call, all_ in zip(calls, whole.samples("total_s"), strict=True))
                figures["share"] = Figure(unit="share", samples=shares)
        rows.append(Row(name=name, words=words, figures=figures, failed=one.failed))
    figures = {}
    if whole.rounds:
        files = sum(whole.samples(f"{name}_mb")[0] for name in taken)
        figures = {"file": _once("MB", files), **_times(whole, whole.samples("total_s"))}
    rows.append(Row(name=WHOLE, figures=figures, failed=whole.failed))
    return Section(
        key=f"onestep {target}",
        title=f"One step on {target}",
        columns=(
            Column(of="call", title="ms", shown="percentiles"),
            Column(of="share", title="of the whole picture"),
            Column(of="peak", title="peak memory, MiB"),
            *seen_columns(rows),
            Column(of="file", title="files, MB"),
            Column(of="precision", title="computes in", shown="words"),
            Column(of="ran", title="on", shown="words"),
        ),
        rows=tuple(rows),
        plots=(Plot(title="Milliseconds; a dot is a round", y="call"),),
        note=NOTE + seen_note(rows),
    )


def _beside(section: Section, limits: PictureLimits | None) -> Section:
    """A section with what its rows' calls take at least, as a share of what they took."""
    if limits is None:
        return section
    least = {name: one.seconds for name, one in limits.calls.items()}
    least[WHOLE] = sum(least.values())
    rows = []
    for row in section.rows:
        shares = {}
        if "call" in row.figures and row.name in least:
            values = 1e3 * least[row.name] / row.figures["call"].values
            shares = {"limit": Figure(unit="limit", samples=tuple(values.tolist()))}
        rows.append(msgspec.structs.replace(row, figures={**row.figures, **shares}))
    times, share, *others = section.columns
    columns = (times, share, Column(of="limit", title="of the limit"), *others)
    return msgspec.structs.replace(section, rows=tuple(rows), columns=columns, note=section.note + LIMIT_NOTE)


def _times(taken: Taken, seconds: Sequence[float]) -> dict[str, Figure]:
    milliseconds = tuple(1e3 * value for value in seconds)
    peak = _once("MiB", max(taken.samples("peak_mib")))
    return {"call": Figure(unit="ms", samples=milliseconds), "peak": peak, **seen_figures(taken)}


def _once(unit: Unit, value: float) -> Figure:
    return Figure(unit=unit, samples=(value,))
