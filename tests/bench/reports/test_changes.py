"""Two reports compared."""

from __future__ import annotations

import msgspec
import pytest

from tandemrt.bench.reports.changes import changes
from tandemrt.bench.reports.schema import Figure, Report, Row, Unit

from .sample import OURS, PEER, report, section

EVEN = (1.0, 1.01, 0.99, 1.0)


def verdicts(ours: tuple[float, ...], peer: tuple[float, ...] = (2.0, 2.02, 1.98, 2.0)) -> dict[str, str]:
    """Of a run of even rounds and one of these."""
    found = changes(report(), report(ours, peer))
    return {one.where.rpartition(", ")[2]: one.verdict for one in found}


def told_of(unit: Unit, ours: tuple[float, ...], peer: tuple[float, ...] = (), *, name: str = "figure") -> Report:
    """A report of one figure of ours and, where it has samples, of a peer."""
    samples = {OURS: ours, PEER: peer}
    rows = tuple(Row(name=who, figures={name: Figure(unit=unit, samples=own)}) for who, own in samples.items() if own)
    return msgspec.structs.replace(report(), sections=(msgspec.structs.replace(section(EVEN, EVEN), rows=rows),))


def test_a_run_is_as_itself() -> None:
    assert verdicts(EVEN) == {OURS: "same", PEER: "same"}


def test_what_is_slower_beyond_the_rounds_is_worse() -> None:
    assert verdicts((1.2, 1.21, 1.19, 1.2))[OURS] == "worse"
    assert verdicts((0.8, 0.81, 0.79, 0.8))[OURS] == "better"


def test_what_is_slower_within_the_rounds_is_the_same() -> None:
    assert verdicts((0.9, 1.3, 1.0, 1.4))[OURS] == "same"


def test_what_runs_of_one_day_differ_by_is_the_same() -> None:
    assert verdicts((1.14, 1.15, 1.13, 1.14)) == {OURS: "same", PEER: "same"}
    after, even, wide = (1.2,) * 31, (1.0,) * 31, (*(0.7,) * 4, *(1.0,) * 23, *(1.3,) * 4)
    for before, allowed, verdict in ((even, 0.15, "worse"), (wide, 0.3, "same")):
        (found,) = changes(told_of("s", before), told_of("s", after))
        assert (found.allowed, found.verdict) == (pytest.approx(allowed), verdict)
        assert found.low > 1.15


def test_what_is_no_time_is_held_to_less() -> None:
    assert [one.verdict for one in changes(told_of("MiB", (100.0,)), told_of("MiB", (105.0,)))] == ["worse"]
    assert [one.verdict for one in changes(told_of("MiB", (100.0,)), told_of("MiB", (101.0,)))] == ["same"]


def test_a_peer_is_compared_by_its_ratios() -> None:
    """On a machine that is half as fast all take twice as long, and the peer is to ours as it was."""
    doubled = tuple(2 * value for value in EVEN), tuple(4 * value for value in EVEN)
    assert verdicts(*doubled) == {OURS: "worse", PEER: "same"}


@pytest.mark.parametrize("unit", ["images/s", "GFLOP/s", "GB/s", "limit", "J"])
def test_what_follows_from_times_is_compared_as_they_are(unit: Unit) -> None:
    halved = told_of(unit, (4.0, 4.0, 4.0), (2.0, 2.0, 2.0)), told_of(unit, (2.0, 2.0, 2.0), (1.0, 1.0, 1.0))
    assert [(one.against, one.verdict) for one in changes(*halved)] == [
        ("", "better" if unit == "J" else "worse"),
        (OURS, "same"),
    ]
    peers = told_of(unit, (4.0, 4.0, 4.0), (2.0, 2.0, 2.0)), told_of(unit, (4.0, 4.0, 4.0), (1.0, 1.0, 1.0))
    assert [one.verdict for one in changes(*peers)] == ["same", "better" if unit == "J" else "worse"]
    once = told_of(unit, (4.0,)), told_of(unit, (2.0,))
    assert [one.verdict for one in changes(*once)] == ["unsure"]


def test_a_share_of_a_whole_is_no_change_of_its_own() -> None:
    assert list(changes(told_of("share", (0.5, 0.5, 0.5)), told_of("share", (0.4, 0.4, 0.4)))) == []
    worse = changes(told_of("limit", (0.5, 0.5, 0.5)), told_of("limit", (0.4, 0.4, 0.4)))
    assert [one.verdict for one in worse] == ["worse"]


def test_few_rounds_tell_nothing() -> None:
    found = list(changes(report(), report((2.0, 2.0), (2.0, 2.0))))
    assert {one.verdict for one in found} == {"unsure"}


def test_the_interval_holds_the_quotient() -> None:
    for one in changes(report(), report((1.0, 1.3, 0.9, 1.1))):
        assert one.low <= one.times <= one.high


def test_what_follows_from_a_time_is_no_change_of_its_own() -> None:
    """A call that takes twice as long is one change, though images and operations a second are halved, too."""

    def taking(seconds: float) -> Report:
        units: dict[Unit, float] = {
            "s": seconds,
            "images/s": 1 / seconds,
            "GFLOP/s": 8 / seconds,
            "limit": 0.5 / seconds,
        }
        figures = {unit: Figure(unit=unit, samples=(value,) * 3) for unit, value in units.items()}
        rows = (Row(name=OURS, figures=figures),)
        return msgspec.structs.replace(report(), sections=(msgspec.structs.replace(section(EVEN, EVEN), rows=rows),))

    assert [(one.figure, one.verdict) for one in changes(taking(1.0), taking(2.0))] == [("s", "worse")]


def test_parts_of_a_peer_are_compared_by_tandemrts_whole_picture() -> None:
    """All take twice as long, and the peer's part is to our picture as it was."""

    def taking(times: float) -> Report:
        whole = section(*(tuple(times * value for value in EVEN),) * 2)
        part = Figure(unit="ms", samples=tuple(500 * times * value for value in EVEN))
        rows = tuple(Row(name=f"{who}: unet", figures={"ms": part}) for who in (OURS, PEER))
        parts = msgspec.structs.replace(whole, key="parts", title="Parts", baseline="", rows=rows)
        return msgspec.structs.replace(report(), sections=(whole, parts))

    found = [one for one in changes(taking(1.0), taking(2.0)) if one.where.startswith("Parts")]
    assert [(one.against, one.before, one.verdict) for one in found] == [("", 500.0, "worse"), (OURS, 0.5, "same")]
