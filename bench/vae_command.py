"""`tandemrt bench vae`: a bundle's decoders beside each other, each alone in a process."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tandemrt.runtime.cli.reporter import Reporter

from .components import component_entrant, file_figure, inputs_of, save_inputs
from .memory import in_fresh_process
from .published import Measured, opened, plan_facts, publish, summary
from .reports.schema import Column, Figure, Plot, Row, Section
from .rounds import Taken, in_rounds
from .sections import otherwise
from .seen import seen_columns, seen_figures, seen_note
from .shared_arguments import BUNDLES, Shared, add_shared, require_least, shared_from

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]

NOTE = (
    "A latent to a picture. Each decoder is alone in its process, so that the peak of resident memory is its own and "
    "the interpreter's; the PSNR is to the first decoder's pictures."
)


@dataclass(frozen=True, slots=True)
class VaePlan:
    """How many latents are painted to decode, and in which steps; None stands for the bundle's."""

    shared: Shared
    latents: int
    steps: str | None

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        return {**self.shared.facts, "latents": str(self.latents), "steps": self.steps or BUNDLES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench vae`."""
    parser.description = (
        "Measure a bundle's decoders, such as Hybrid-SD's base, small and tiny one: latency, memory, and how far their "
        "pictures are from the first one's, on latents that the bundle painted."
    )
    add_shared(parser)
    parser.add_argument("--latents", type=int, default=2, metavar="N", help="painted beforehand, decoded in turns (2)")
    parser.add_argument("--steps", metavar="STEPS", help="of these: 25, or 10,15 where the bundle has two denoisers")


def plan_from_arguments(namespace: argparse.Namespace) -> VaePlan:
    """The command line as a plan. ArgumentError: an option's value cannot be used."""
    require_least("--latents", namespace.latents, 1)
    return VaePlan(shared_from(namespace), namespace.latents, namespace.steps)


def run(plan: VaePlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: the first decoder failed on the first target, or the report's folder is taken or cannot be
            written.
        BundleError, ExportError, PlanError, RequestError: as `bench run`.
    """
    shared = plan.shared
    measured = opened(shared, reporter)
    work = measured.work(shared, measured.plan(shared, plan.steps))
    seeds = range(shared.rounds.seed, shared.rounds.seed + plan.latents)
    with TemporaryDirectory() as folder:
        reporter.progress("paint the latents", 0, 1)
        in_fresh_process(save_inputs, work, shared.targets[0], seeds, Path(folder))
        reporter.progress("paint the latents", 1, 1)
        decoders = measured.bundle.manifest.names("vae_decoder")
        latents = inputs_of(decoders[0], Path(folder))
        entrants = {
            f"{name} on {target}": replace(
                component_entrant(work, measured.bundle, name, target, latents), reference=f"{decoders[0]} on {target}"
            )
            for target in shared.targets
            for name in decoders
        }
        Path(folder, "pictures").mkdir()
        taken = in_rounds(entrants, shared.rounds, Path(folder, "pictures"), reporter.progress, measured.watch.probes)
    sections = [
        _section(measured, target, {name: taken[f"{name} on {target}"] for name in decoders})
        for target in shared.targets
    ]
    return publish("decoders", shared, measured, work.resolved(plan.facts), sections, tuple(otherwise(taken)))


def _section(measured: Measured, target: str, taken: Mapping[str, Taken]) -> Section:
    rows = []
    for name, one in taken.items():
        figures = {"file": file_figure(measured.bundle, name, one)}
        if one.rounds:
            figures["decode"] = Figure(unit="ms", samples=tuple(1e3 * value for value in one.samples("call_s")))
            figures["peak"] = Figure(unit="MiB", samples=(max(one.samples("peak_mib")),))
            figures |= seen_figures(one)
        if one.psnr_db:
            figures["psnr"] = Figure(unit="dB", samples=tuple(one.psnr_db))
        rows.append(Row(name=name, figures=figures, failed=one.failed))
    first = next(iter(taken))
    return Section(
        key=f"vae {target}",
        title=f"Decoders on {target}",
        baseline=first,
        columns=(
            Column(of="decode", title="ms a picture", shown="percentiles"),
            Column(of="decode", title=f"times {first}", shown="ratio"),
            Column(of="peak", title="peak memory, MiB"),
            *seen_columns(rows),
            Column(of="file", title="files, MB"),
            Column(of="psnr", title=f"PSNR to {first}, dB"),
        ),
        rows=tuple(rows),
        plots=(Plot(title="Milliseconds a picture; a dot is a round", y="decode"),),
        note=NOTE + seen_note(rows),
    )
