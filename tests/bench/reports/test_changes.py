"""Two reports compared."""

from __future__ import annotations

import msgspec
import pytest

from tandemrt.bench.reports.changes import changes, machine_changes, unmatched
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


def test_what_only_one_has_measured_is_told() -> None:
    failed = section(EVEN, EVEN)
    rows = (failed.rows[0], Row(name=PEER, failed="its process was ended"), Row(name="optimum", failed="another why"))
    before, after = report(), msgspec.structs.replace(report(), sections=(msgspec.structs.replace(failed, rows=rows),))
    assert list(unmatched(before, after)) == [f"Whole pictures, {PEER}: measured → not measured, its process was ended"]
    assert list(unmatched(after, before)) == [f"Whole pictures, {PEER}: not measured, its process was ended → measured"]
    less = msgspec.structs.replace(report(), sections=())
    assert list(unmatched(before, less)) == [f"Whole pictures, {OURS}, {PEER}: measured → not there"]
    assert list(unmatched(before, before)) == []


def test_few_rounds_tell_nothing() -> None:
    found = list(changes(report(), report((2.0, 2.0), (2.0, 2.0))))
    assert {one.verdict for one in found} == {"unsure"}


def test_the_interval_holds_the_quotient() -> None:
    for one in changes(report(), report((1.0, 1.3, 0.9, 1.1))):
        assert one.low <= one.times <= one.high


def test_another_machine_is_told() -> None:
    other = report()
    machine = msgspec.structs.replace(other.machine, cores=4, versions={"tandemrt": "0.2.0"})
    lines = list(machine_changes(report(), msgspec.structs.replace(other, machine=machine)))
    assert lines == ["cores: 2 → 4", "tandemrt: 0.1.0 → 0.2.0"]
