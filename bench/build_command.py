"""`tandemrt bench build`: what building a bundle's engines takes, and having them again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import PLAIN

from .builds import Asked, Builds, asked, build_in_turns
from .published import opened, plan_facts, publish, summary
from .reports.schema import Column, Figure, Plot, Row, Section
from .shared_arguments import UNPAINTED, Shared, add_subject, add_where, shared_from

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "run", "summary"]

ROUNDS = 3
NOTE = (
    "Each engine is built by a process of its own into an empty cache, and asked for again from there: of what was "
    "hashed when it was built, and not touched since, the stamps are compared. The peak is of the builder's resident "
    "memory."
)
PLAIN_NOTE = (
    " Plain is what Polygraphy builds of the same graph and profile in the same round: parsing, building and writing, "
    "without the process's start, digests and the flush to the disk, which count in the others."
)


@dataclass(frozen=True, slots=True)
class BuildsPlan:
    """Which components, in which profile; none stands for all, and None for the bundle's own size."""

    shared: Shared
    components: tuple[str, ...]
    profile: str | None

    @property
    def facts(self) -> Mapping[str, str]:
        """What was asked for, for the report."""
        return {
            **self.shared.whereabouts,
            "components": ", ".join(self.components) or "all",
            "profile": self.profile or "the bundle's size",
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt bench build`."""
    parser.description = (
        "Measure what building engines takes: seconds, memory and size, and how soon one that is there is there again. "
        "TensorRT-RTX's need no GPU; they are built beside plain ones of Polygraphy."
    )
    add_subject(parser)
    what = parser.add_argument_group("what is built")
    what.add_argument("--component", action="append", dest="components", default=[], help="by default all; repeatable")
    what.add_argument("--profile", metavar="P", help="as of build-engine (default: the bundle's size)")
    add_where(parser, ROUNDS)
    parser.set_defaults(**UNPAINTED, threads=None, warm_up=0)


def plan_from_arguments(namespace: argparse.Namespace) -> BuildsPlan:
    """The command line as a plan. ArgumentError: an option's value cannot be used."""
    if namespace.profile is not None:
        parse_profile(namespace.profile)
    return BuildsPlan(shared_from(namespace, 0), tuple(dict.fromkeys(namespace.components)), namespace.profile)


def run(plan: BuildsPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure, and write the report.

    Raises:
        BenchmarkError: nothing could be built, or the report's folder is taken or cannot be written.
        ArgumentError, TargetError, CacheError: as of `tandemrt build-engine`.
        BundleError, ExportError: the bundle is damaged, or the preset cannot be exported.
    """
    shared = plan.shared
    measured = opened(shared, reporter, runs=False)
    wanted = BuildPlan(
        bundle=measured.bundle.path,
        targets=tuple(map(parse_target, shared.targets)),
        cache=shared.cache,
        components=plan.components,
        profiles=() if plan.profile is None else (parse_profile(plan.profile),),
    )
    every = [asked(request) for request in requests_of(wanted, measured.bundle)]
    build_in_turns(every, shared.rounds.count, shared.cache, reporter.progress)
    if all(one.own.failed for one in every):
        raise BenchmarkError(f"engines for {', '.join(shared.targets)}", f"none could be built: {every[0].own.failed}")
    sections = [
        _section(str(target), [one for one in every if one.request.target == target]) for target in wanted.targets
    ]
    return publish("engine builds", shared, measured, plan.facts, sections)


def _section(target: str, every: Sequence[Asked]) -> Section:
    peered = any(one.plain is not None for one in every)
    times = (Column(of="times", title="times a plain build"),) if peered else ()
    return Section(
        key=f"build {target}",
        title=f"Engines for {target}",
        columns=(
            Column(of="build", title="s to build"),
            *times,
            Column(of="peak", title="peak memory, MiB"),
            Column(of="size", title="size, MB"),
            Column(of="again", title="ms where it is there, at most"),
        ),
        rows=tuple(row for one in every for row in _rows(one)),
        plots=(Plot(title="Seconds to build; a dot is a round", y="build"),),
        note=NOTE + PLAIN_NOTE * peered,
    )


def _rows(one: Asked) -> Iterator[Row]:
    """An engine's row and, where there is one, that of the plain build."""
    variant = one.request.ingredients.variant
    name = one.request.component + (f" ({variant})" if variant != PLAIN else "")
    figures = _figures(one.own)
    if one.own.again_s:
        figures["again"] = Figure(unit="ms", samples=(1e3 * max(one.own.again_s),))
    if one.plain is not None and one.own.build_s and one.plain.build_s:
        ratios = tuple(own / plain for own, plain in zip(one.own.build_s, one.plain.build_s, strict=True))
        figures["times"] = Figure(unit="times", samples=ratios)
    yield Row(name=name, figures=figures, failed=one.own.failed)
    if one.plain is not None:
        yield Row(name=f"{name}, plain", figures=_figures(one.plain), failed=one.plain.failed)


def _figures(builds: Builds) -> dict[str, Figure]:
    if not builds.build_s:
        return {}
    return {
        "build": Figure(unit="s", samples=tuple(builds.build_s)),
        "peak": Figure(unit="MiB", samples=(max(builds.peak_mib),)),
        "size": Figure(unit="MB", samples=(builds.size_mb,)),
    }
