"""Two reports compared."""

from __future__ import annotations

import msgspec

from tandemrt.bench.reports.changes import changes, machine_changes

from .sample import OURS, PEER, report

EVEN = (1.0, 1.01, 0.99, 1.0)


def verdicts(ours: tuple[float, ...], peer: tuple[float, ...] = (2.0, 2.02, 1.98, 2.0)) -> dict[str, str]:
    """Of a run of even rounds and one of these."""
    found = changes(report(), report(ours, peer))
    return {one.where.rpartition(", ")[2]: one.verdict for one in found}


def test_a_run_is_as_itself() -> None:
    assert verdicts(EVEN) == {OURS: "same", PEER: "same"}


def test_what_is_slower_beyond_the_rounds_is_worse() -> None:
    assert verdicts((1.2, 1.21, 1.19, 1.2))[OURS] == "worse"
    assert verdicts((0.8, 0.81, 0.79, 0.8))[OURS] == "better"


def test_what_is_slower_within_the_rounds_is_the_same() -> None:
    assert verdicts((0.9, 1.3, 1.0, 1.4))[OURS] == "same"


def test_a_peer_is_compared_by_its_ratios() -> None:
    """On a machine that is half as fast all take twice as long, and the peer is to ours as it was."""
    doubled = tuple(2 * value for value in EVEN), tuple(4 * value for value in EVEN)
    assert verdicts(*doubled) == {OURS: "worse", PEER: "same"}


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
