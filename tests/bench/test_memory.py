"""Processes that have done nothing before: what they raise, and their end."""

from __future__ import annotations

import os

import pytest

from tandemrt.bench.memory import in_fresh_process
from tandemrt.runtime.errors import BenchmarkError, PlanError
from tandemrt.runtime.plan_steps import parse_steps


def test_an_error_of_a_fresh_process_is_raised_whole() -> None:
    with pytest.raises(PlanError) as here:
        parse_steps("a", ())
    with pytest.raises(PlanError) as there:
        in_fresh_process(parse_steps, "a", ())
    assert str(there.value) == str(here.value)
    assert vars(there.value) == vars(here.value)


def test_a_fresh_process_that_is_ended_is_told() -> None:
    with pytest.raises(BenchmarkError, match="abort: its process was ended, most likely because memory ran out"):
        in_fresh_process(os.abort)
