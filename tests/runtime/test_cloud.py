"""When a server that does not help is asked again, and when it is left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tandemrt.runtime import Cloud, cloud
from tandemrt.runtime.cloud import reason_alone
from tandemrt.runtime.errors import CloudError
from tandemrt.runtime.handover import in_half


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    monkeypatch.setattr(cloud, "BROKEN_S", 0.2)
    return Cloud("http://127.0.0.1:9", seconds=5)


def failing(reason: str) -> Callable[[], str]:
    def exchange() -> str:
        raise CloudError("there", reason, "did not help")

    return exchange


def ended(server: Cloud, exchange: Callable[[], str]) -> str:
    """What an exchange gave, or why it did not."""
    try:
        return server.retried(exchange, server.bounds())
    except CloudError as error:
        return error.reason


def reasons(server: Cloud, exchange: Callable[[], str], count: int) -> list[str]:
    """How so many exchanges ended."""
    return [ended(server, exchange) for _ in range(count)]


@pytest.mark.parametrize("reason", ["busy", "unready", "unauthorized", "conflict", "refused", "untrusted"])
def test_who_answers_is_not_left_alone(reason: str, server: Cloud) -> None:
    assert reasons(server, failing(reason), 5) == [reason] * 5


@pytest.mark.parametrize("reason", ["unreachable", "deadline", "malformed", "failed"])
def test_who_fails_is_left_alone_for_a_while(reason: str, server: Cloud) -> None:
    assert reasons(server, failing(reason), 5) == [reason] * 3 + ["broken"] * 2
    time.sleep(0.25)
    # One failure more, and it is left alone again; one success, and it is whole.
    assert reasons(server, failing(reason), 2) == [reason, "broken"]
    time.sleep(0.25)
    assert reasons(server, lambda: "made", 2) == ["made"] * 2
    assert reasons(server, failing(reason), 4) == [reason] * 3 + ["broken"]


def test_a_busy_answer_between_makes_it_whole(server: Cloud) -> None:
    for reason in ("failed", "failed", "busy", "failed", "failed"):
        assert reasons(server, failing(reason), 1) == [reason]


def test_one_tries_whether_it_is_whole_again(server: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons(server, failing("failed"), 3)
    time.sleep(0.25)
    monkeypatch.setattr(cloud, "BROKEN_S", 10.0)
    begun, goes_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        goes_on.wait(10)
        return "made"

    with ThreadPoolExecutor(1) as threads:
        trying = threads.submit(server.retried, slow, server.bounds())
        begun.wait(10)
        assert reasons(server, lambda: "made", 3) == ["broken"] * 3
        goes_on.set()
        assert trying.result() == "made"
    assert reasons(server, lambda: "made", 1) == ["made"]


def test_a_state_in_half_the_bytes() -> None:
    state = np.linspace(-3, 3, 50, dtype=np.float32)
    half = in_half(state)
    assert half is not None
    np.testing.assert_allclose(half, state, rtol=2**-11, atol=1e-7)
    assert in_half(state * np.float32(1e5)) is None


def test_others_are_told_the_reason_alone() -> None:
    told = reason_alone("deadline: https://10.0.0.7: did not answer within 3 s")
    assert told == "deadline: it did not answer in time"
    assert reason_alone("") == ""
