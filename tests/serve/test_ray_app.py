"""What a bundle on Ray Serve is told, and how its parts ask each other there: all that needs no cluster."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import CancelledError, ExecutionError
from tandemrt.runtime.errors import ArgumentError
from tandemrt.serve.limits import Limits
from tandemrt.serve.problems import Problem, busy
from tandemrt.serve.ray_options import Options, apart_of, options_of, token_of
from tandemrt.serve.ray_replica import LostError, bounds_within

from ..lacking import lacking
from .asking import TOKEN

needs_ray = pytest.mark.usefixtures("ray")
MADE = {"sample": np.zeros((1, 4, 8, 8), np.float32)}


@pytest.fixture(scope="module")
def ray() -> None:
    if find_spec("ray") is None:
        lacking('Ray: pip install "tandemrt[ray]"')


def test_what_is_told() -> None:
    told = {"bundle": "x", "limits": {"steps": "50"}, "branches": "unet, unet_small"}
    options = options_of(told)
    assert options.limits == Limits(running=16, steps=50)
    assert apart_of(options, ("unet_small", "unet")) == ("unet", "unet_small")
    assert apart_of(Options("x"), ("unet",)) == ()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "missing required field `bundle`"),
        ({"bundle": "x", "replicas": 2}, "args: unknown options, got .*'replicas'"),
        ({"bundle": "x", "limits": {"request": 2}}, "limits: unknown options"),
        ({"bundle": "x", "limits": {"batch": 2}}, "limits: unknown options"),
        ({"bundle": "x", "limits": 3}, "limits: unknown options"),
        ({"bundle": "x", "limits": {"steps": "many"}}, "args: Expected `int`"),
        ({"bundle": "x", "limits": {"running": 0}}, "limits: running: not usable, got 0, expected 1 or more"),
        ({"bundle": "x", "limits": {"waiting": -1}}, "limits: waiting: not usable, got -1, expected 0 or more"),
        ({"bundle": "x", "limits": {"seconds": 0}}, r"limits: seconds: not usable, got 0.*, expected 0\.001 or more"),
        ({"bundle": "x", "limits": {"steps": 10**9}}, "limits: steps: not usable, got 1000000000, expected 1 or more"),
    ],
)
def test_what_cannot_be_used_is_told(told: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        options_of(told)


def test_an_unknown_denoiser_has_no_branches() -> None:
    with pytest.raises(ArgumentError, match="branches: unknown denoiser, got 'vae', expected of unet"):
        apart_of(Options("x", branches="unet,vae"), ("unet",))


def test_who_may_ask_has_to_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEMRT_TOKEN", raising=False)
    with pytest.raises(ArgumentError, match=r"token_file: there is no token\. Put one into"):
        token_of(Options("x"))
    assert token_of(Options("x", token_file="none")) is None
    monkeypatch.setenv("TANDEMRT_TOKEN", TOKEN)
    assert token_of(Options("x")) == TOKEN
    # The file's own is read where requests come in.
    assert token_of(Options("x", token_file="file")) is None


@needs_ray
def test_an_application_is_built_of_a_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandemrt.serve.ray_app import build  # noqa: PLC0415 (Ray takes its time)

    monkeypatch.delenv("TANDEMRT_TOKEN", raising=False)
    with pytest.raises(ArgumentError, match="there is no token"):
        build({"bundle": str(bundle)})
    with pytest.raises(ArgumentError, match="unknown denoiser, got 'vae'"):
        build({"bundle": str(bundle), "token_file": "none", "branches": "unet,vae"})
    build({"bundle": str(bundle), "token_file": "none", "branches": "unet"})


def test_a_problem_is_sent_whole() -> None:
    sent = pickle.loads(pickle.dumps(busy(3)))
    assert (sent.facts, sent.headers) == (busy(3).facts, {"Retry-After": "3"})


class Answer:
    """What Ray's handle gives of a call: what is seen of it, look by look, and late from then on."""

    def __init__(self, *looks: Any) -> None:
        self.looks = list(looks)
        self.cancelled = False

    def result(self, timeout_s: float) -> Any:
        if not self.looks:
            time.sleep(timeout_s)
            raise TimeoutError
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        return look

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment's handle whose calls give these answers; asked: the seconds that each was given."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[float] = []

    @property
    def run_component(self) -> Handle:
        return self

    def remote(self, name: str, inputs: Mapping[str, Any], seconds: float) -> Answer:
        assert (name, inputs) == ("unet", {})
        self.asked.append(seconds)
        return self.answers.pop(0)


def branch_of(*answers: Answer) -> tuple[Any, Handle]:
    """A branch, and the handle that it asks."""
    from tandemrt.serve.ray_calls import Branch  # noqa: PLC0415

    handle = Handle(*answers)
    return Branch(handle), handle


def raised_there(error: Exception) -> Exception:
    """An error of a replica as Ray raises it at its caller."""
    from ray.exceptions import RayTaskError  # noqa: PLC0415

    told = RayTaskError("run_component", "its traceback", error, "replica", 1, "127.0.0.1")
    made: Exception = pickle.loads(pickle.dumps(told)).as_instanceof_cause()
    return made


@needs_ray
def test_a_branch_is_given_what_is_left_of_the_request() -> None:
    from ray.exceptions import GetTimeoutError  # noqa: PLC0415

    branch, handle = branch_of(Answer(TimeoutError(), GetTimeoutError("not yet"), MADE))
    assert branch("unet", {}, bounds_within(20)) is MADE
    assert 19 < handle.asked[0] <= 20


@needs_ray
def test_a_branch_ends_with_its_request() -> None:
    late, cancelled = Answer(), Answer()
    branch, _ = branch_of(late, cancelled)
    began = time.monotonic()
    with pytest.raises(CancelledError, match="unet: its branch on another replica took longer"):
        branch("unet", {}, bounds_within(0.1))
    assert late.cancelled
    bounds = bounds_within(60)
    threading.Timer(0.1, bounds.cancelled.set).start()
    with pytest.raises(CancelledError):
        branch("unet", {}, bounds)
    assert cancelled.cancelled
    assert time.monotonic() - began < 2


@needs_ray
def test_a_branch_that_is_lost_is_asked_for_once_more() -> None:
    from ray.exceptions import ActorDiedError  # noqa: PLC0415

    branch, handle = branch_of(
        Answer(ActorDiedError()), Answer(MADE), Answer(ActorDiedError()), Answer(ActorDiedError())
    )
    assert branch("unet", {}, bounds_within(20)) is MADE
    with pytest.raises(LostError, match="unet: its replica is gone"):
        branch("unet", {}, bounds_within(20))
    assert len(handle.asked) == 4


@needs_ray
@pytest.mark.parametrize("error", [busy(3), ExecutionError("unet", "failed"), TimeoutError("of its own")])
def test_what_a_branch_raises_is_raised(error: Exception) -> None:
    branch, _ = branch_of(Answer(raised_there(error)))
    with pytest.raises(type(error)) as caught:
        branch("unet", {}, bounds_within(20))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    if isinstance(error, Problem):
        assert caught.value.headers == {"Retry-After": "3"}  # type: ignore[attr-defined]


@needs_ray
def test_a_branch_that_too_many_wait_for() -> None:
    from ray.serve.exceptions import BackPressureError  # noqa: PLC0415

    branch, _ = branch_of(Answer(BackPressureError(2, 2, 429, 1.5)))
    with pytest.raises(Problem) as caught:
        branch("unet", {}, bounds_within(20))
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "2"})
