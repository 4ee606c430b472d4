"""A small report for tests, of two contenders in four rounds."""

from __future__ import annotations

from collections.abc import Sequence

from tandemrt.bench.reports.schema import Column, Figure, Machine, Method, Plot, Report, Row, Section, Subject

OURS, PEER = "tandemrt openvino:cpu", "diffusers"


def machine(clock: tuple[float, float] = (2600, 2600), load: float = 0.1, other_cores: float | None = None) -> Machine:
    """A quiet one."""
    return Machine(
        processor="A processor",
        cores=2,
        memory_gib=23.5,
        devices=(),
        system="Linux",
        python="3.11.7",
        versions={"tandemrt": "0.1.0"},
        clock_mhz=clock,
        load_average=(load, load),
        other_cores=other_cores,
        energy="of all processors (package-0)",
    )


def section(ours: Sequence[float], peer: Sequence[float]) -> Section:
    """Seconds of the two, round by round; the peer's are compared with ours."""
    rows = tuple(
        Row(name=name, figures={"total": Figure(unit="s", samples=tuple(samples))})
        for name, samples in ((OURS, ours), (PEER, peer))
    )
    return Section(
        key="pictures",
        title="Whole pictures",
        baseline=OURS,
        columns=(
            Column(of="total", title="s", shown="percentiles"),
            Column(of="total", title="times ours", shown="ratio"),
        ),
        rows=(*rows, Row(name="optimum", failed="has no environment yet")),
        plots=(Plot(title="Seconds a call", y="total"),),
    )


def report(ours: Sequence[float] = (1.0, 1.01, 0.99, 1.0), peer: Sequence[float] = (2.0, 2.02, 1.98, 2.0)) -> Report:
    """Of both."""
    return Report(
        title="a <bundle>: a benchmark",
        began="2026-01-01T00:00:00+00:00",
        request={"steps": "10,15"},
        machine=machine(),
        method=Method(warm_up=1, rounds=len(ours), order="in turns", seed=0, threads=None),
        subjects=(Subject(name="bundle", digest="ab" * 32, random_weights=False, file_mb={"unet": 1.0}),),
        sections=(section(ours, peer),),
        caveats=("Other work ran beside.",),
    )
