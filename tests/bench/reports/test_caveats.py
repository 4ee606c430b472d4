"""What a reader is told first."""

from __future__ import annotations

from tandemrt.bench.reports.caveats import caveats, drift_share, spread_share
from tandemrt.bench.reports.schema import Figure, Subject

from .sample import OURS, machine, section

EVEN = (1.0, 1.01, 0.99, 1.0)


def told(ours: tuple[float, ...] = EVEN, *, clock: tuple[float, float] = (2600, 2600), load: float = 0.1) -> str:
    """All that is told of even rounds of a peer and these of ours."""
    return "\n".join(caveats(machine(clock, load), (), (section(ours, EVEN),), (), 7))


def test_a_quiet_run_tells_only_who_was_not_measured() -> None:
    assert told() == "Not measured: optimum, has no environment yet"


def test_rounds_that_differ_are_told() -> None:
    assert f"Whole pictures: rounds differ by more than 10%: {OURS} 50%." in told((1.0, 1.5, 1.0, 1.0))


def test_later_rounds_that_take_longer_are_told() -> None:
    assert f"the later rounds took longer: {OURS} 8%." in told((1.0, 1.0, 1.08, 1.08))
    assert "longer" not in told((1.08, 1.08, 1.0, 1.0))


def test_a_first_round_that_takes_longest_is_told() -> None:
    sentence = "Whole pictures: the first round that counts was the slowest, as while warming up"
    assert f"{sentence}: {OURS} 104%." in told((1.589, 0.834, 0.736, 0.78))
    assert sentence in told((1.12, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    assert all(sentence not in told(ours) for ours in ((1.05, 1.0, 1.0, 1.0), (1.5, 1.0, 1.0, 1.6), (1.5, 1.0)))


def test_few_rounds_are_told() -> None:
    few = "Rounds: 4. Medians of so few tell little."
    assert [few in caveats(machine(), (), (), (), rounds) for rounds in (4, 5)] == [True, False]


def test_a_clock_that_fell_is_told() -> None:
    assert "The clock fell from 2,600 to 2,000 MHz" in told(clock=(2600, 2000))


def test_other_work_is_told() -> None:
    assert "the load average was 1.2 on 2 cores" in told(load=1.2)


def test_other_work_meanwhile_is_told() -> None:
    (busy,) = caveats(machine(other_cores=0.25), (), (), (), 7)
    assert busy == (
        "Other work ran beside: it had 0.2 of 2 cores on average while it was measured. "
        "Ratios suffer as well as times: it slows contenders unevenly."
    )
    assert caveats(machine(other_cores=0.2), (), (), (), 7) == ()


def test_the_load_average_counts_where_other_work_is_not_told() -> None:
    """It also holds what ran before, such as another benchmark."""
    assert caveats(machine(load=1.9, other_cores=0.05), (), (), (), 7) == ()


def test_what_ran_otherwise_comes_first_and_random_weights_last() -> None:
    random = Subject(name="preset", digest="00", random_weights=True, file_mb={})
    first, *_, last = caveats(machine(), (random,), (section(EVEN, EVEN),), ("unet ran in fp32",), 7)
    assert first == "unet ran in fp32"
    assert last.startswith("Random weights (preset)")


def test_shares() -> None:
    assert spread_share(Figure(unit="s", samples=(1.0, 1.0))) == 0
    assert drift_share(Figure(unit="s", samples=(1.0, 1.0, 2.0, 2.0))) == 1
