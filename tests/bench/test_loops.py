"""The two loops that are timed against each other do the same work."""

import numpy as np
import pytest

from tandemrt.bench import loops


@pytest.mark.parametrize("scheduler_class", loops.SOLVERS.values())
def test_both_loops_end_at_the_same_latents(scheduler_class):
    ours, theirs = loops.runtime_loop(scheduler_class)(), loops.diffusers_loop(scheduler_class)()
    assert ours.shape == theirs.shape == loops.LATENT_SHAPE
    assert np.abs(ours - theirs).max() <= 2e-4 * np.abs(theirs).max()


def test_a_loop_can_be_run_again():
    generate = loops.runtime_loop("EulerDiscreteScheduler")
    first = generate().copy()
    assert np.array_equal(generate(), first)


def test_overheads_are_measured_for_both_in_each_solver():
    rows = loops.step_overheads(warm_up=1, repeats=2)
    assert [row["solver"] for row in rows] == list(loops.SOLVERS)
    assert {row[name]["count"] for row in rows for name in ("tandemrt", "diffusers")} == {2}
    assert all(row[name]["minimum"] > 0 for row in rows for name in ("tandemrt", "diffusers"))
