"""`tandemrt bench limits`: how near a bundle's models come to what the machine can do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import TandemError
from tandemrt.runtime.targets import parse_target

from .limits import limits_section
from .picture_limits import COPIED, SIDE
from .published import opened, plan_facts, publish, summary
from .rates import Options
from .shared_arguments import UNPAINTED, Shared, add_runs, add_subject, require_least, shared_from

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]


@dataclass(frozen=True, slots=True)
class LimitsPlan:
    """Which components, in which profile; None stands for the bundle's size without guidance, no component for all."""

    shared: Shared
    components: tuple[str, ...]
    profile: str | None
    side: int
    copied: int

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        return {
            **self.shared.whereabouts,
            "components": ", ".join(self.components) or "all",
            "profile": self.profile or "the bundle's size, unguided",
            "side of the product": str(self.side),
            "numbers copied": str(self.copied),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench limits`."""
    parser.description = (
        "Measure what a call of each model takes beside what the machine can do at best, which a chain of matrix "
        "products and a copy of a large array show through the same backend, in the same rounds. Of targets that run "
        "ONNX."
    )
    add_subject(parser)
    add_runs(parser)
    what = parser.add_argument_group("what is run")
    what.add_argument("--component", action="append", dest="components", default=[], help="by default all; repeatable")
    what.add_argument("--profile", metavar="P", help="as of build-engine (default: the bundle's size, unguided)")
    what.add_argument("--side", type=int, default=SIDE, metavar="N", help=f"of the product's matrices ({SIDE})")
    what.add_argument("--copied", type=int, default=COPIED, metavar="N", help=f"numbers that are copied ({COPIED})")
    parser.set_defaults(**UNPAINTED)


def plan_from_arguments(namespace: argparse.Namespace) -> LimitsPlan:
    """The command line as a plan. ArgumentError: an option's value cannot be used."""
    require_least("--side", namespace.side, 1)
    require_least("--copied", namespace.copied, 1)
    components = tuple(dict.fromkeys(namespace.components))
    return LimitsPlan(shared_from(namespace), components, namespace.profile, namespace.side, namespace.copied)


def run(plan: LimitsPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: the report's folder is taken or cannot be written.
        BundleError, ExportError, TargetError, ExecutionError, ArgumentError: as `bench run` and, on the first target,
            `limits_section`.
    """
    shared = plan.shared
    measured = opened(shared, reporter)
    manifest = measured.bundle.manifest
    profile = plan.profile or f"{manifest.defaults.width}x{manifest.defaults.height}:unguided"
    options = Options(plan.side, plan.copied, shared.threads, shared.rounds.warm_up, shared.rounds.count)
    names = plan.components or tuple(manifest.components)
    sections, failed = [], []
    for done, target in enumerate(shared.targets):
        reporter.progress("models and limits in turns", done, len(shared.targets))
        try:
            sections.append(limits_section(measured.bundle, parse_target(target), names, profile, options))
        except TandemError as error:
            if not sections:
                raise
            failed.append(f"Not measured: {target}, {error}")
    reporter.progress("models and limits in turns", len(shared.targets), len(shared.targets))
    return publish("beside the limit", shared, measured, plan.facts, sections, failed)
