"""What stages do at each step of a stale pipeline, against AsyncDiff's rules worked out by hand."""

from __future__ import annotations

import pytest

from tandemrt.runtime.errors import PlanError
from tandemrt.runtime.stage_work import Pipelining, StageWork, window_work


def test_with_a_stride_of_one_every_stage_runs_at_every_step() -> None:
    work = dict(window_work(Pipelining(2), first=3, last=6, steps=10))
    assert work == {step: StageWork(step) for step in (4, 5, 6)}


def test_time_shift_gives_the_time_step_before() -> None:
    work = dict(window_work(Pipelining(2, time_shift=True), first=3, last=5, steps=10))
    assert work == {4: StageWork(3), 5: StageWork(4)}


def test_with_a_stride_of_two_stages_run_ahead_for_the_step_that_follows() -> None:
    work = dict(window_work(Pipelining(2, stride=2), first=3, last=7, steps=10))
    assert work == {
        4: StageWork(5, 4),
        5: StageWork(),
        6: StageWork(7, 6),
        7: StageWork(),
    }
    shifted = dict(window_work(Pipelining(2, stride=2, time_shift=True), first=3, last=5, steps=10))
    assert shifted == {4: StageWork(4, 3), 5: StageWork()}


def test_no_stage_runs_ahead_of_the_last_step() -> None:
    work = dict(window_work(Pipelining(2, stride=2), first=6, last=9, steps=10))
    assert work[9] == StageWork(9, 9)


@pytest.mark.parametrize(("stages", "texts"), [(2, (False, True)), (3, (False, True, True)),
                                               (4, (False, False, True, True))])  # fmt: skip
def test_the_second_half_of_the_stages_sees_the_conditional_text(stages: int, texts: tuple[bool, ...]) -> None:
    pipelining = Pipelining(stages)
    assert tuple(map(pipelining.conditional, range(stages))) == texts
    again = Pipelining(stages, stride=2)
    assert (pipelining.workers, again.workers) == (stages, stages + 1)
    twice = [1 if conditional else 2 for conditional in texts]
    assert [pipelining.calls(stage) for stage in range(stages)] == twice
    assert [again.calls(stage) for stage in range(stages)] == [*twice[:-1], 2]


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(PlanError, match=r"placement_config: model_n: stages of a pipeline, got 5, expected 2\.\.4"):
        Pipelining(5)
    with pytest.raises(PlanError, match="placement_config: stride: out of range, got 3, expected 1 or 2"):
        Pipelining(2, stride=3)
