"""When a server that does not help is asked again, and when it is left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage

import numpy as np
import pytest

from tandemrt.runtime import Cloud, cloud
from tandemrt.runtime.bounded_socket import Bounds
from tandemrt.runtime.cloud_reasons import reason_alone, refused
from tandemrt.runtime.connections import Answer
from tandemrt.runtime.errors import CancelledError, CloudError
from tandemrt.runtime.handover import in_half


@pytest.fixture
def server() -> Cloud:
    return Cloud("http://127.0.0.1:9", seconds=5)


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the time pass for which a server is left alone."""
    clock, ahead = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead)

    def pass_by() -> None:
        nonlocal ahead
        ahead += cloud.BROKEN_S

    return pass_by


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
def test_who_fails_is_left_alone_for_a_while(reason: str, server: Cloud, forward: Callable[[], None]) -> None:
    assert reasons(server, failing(reason), 5) == [reason] * 3 + ["broken"] * 2
    forward()
    # One failure more, and it is left alone again; one success, and it is whole.
    assert reasons(server, failing(reason), 2) == [reason, "broken"]
    forward()
    assert reasons(server, lambda: "made", 2) == ["made"] * 2
    assert reasons(server, failing(reason), 4) == [reason] * 3 + ["broken"]


def test_a_busy_answer_between_makes_it_whole(server: Cloud) -> None:
    for reason in ("failed", "failed", "busy", "failed", "failed"):
        assert reasons(server, failing(reason), 1) == [reason]


def test_one_tries_whether_it_is_whole_again(server: Cloud, forward: Callable[[], None]) -> None:
    reasons(server, failing("failed"), 3)
    forward()
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


@pytest.mark.parametrize("error", [CancelledError("generation", "cancelled"), KeyboardInterrupt()])
def test_who_tries_and_is_cancelled_gives_his_turn_back(
    error: BaseException, server: Cloud, forward: Callable[[], None]
) -> None:
    reasons(server, failing("failed"), 3)
    forward()

    def stopped() -> str:
        raise error

    for _ in range(2):
        with pytest.raises(type(error)):
            server.retried(stopped, server.bounds())
    assert reasons(server, failing("failed"), 2) == ["failed", "broken"]  # it has yet to show that it helps


def test_who_is_cancelled_lets_nobody_pass(server: Cloud) -> None:
    """One who asked while it was whole, and is cancelled when it is no more."""

    def stopped() -> str:
        reasons(server, failing("failed"), 3)
        raise CancelledError("generation", "cancelled")

    with pytest.raises(CancelledError):
        server.retried(stopped, server.bounds())
    assert ended(server, lambda: "made") == "broken"


def test_who_has_no_time_from_the_first_says_nothing_of_the_server(server: Cloud) -> None:
    asked: list[str] = []
    for _ in range(4):
        with pytest.raises(CloudError, match="did not answer within 5 s") as late:
            server.retried(lambda: asked.append("asked"), server.bounds(spent_s=6))
        assert late.value.reason == "deadline"
    assert asked == []
    assert reasons(server, failing("failed"), 3) == ["failed"] * 3


def test_who_is_known_to_help_is_asked_again(server: Cloud) -> None:
    assert reasons(server, failing("failed"), 4) == ["failed"] * 3 + ["broken"]
    server.whole()
    assert reasons(server, failing("failed"), 4) == ["failed"] * 3 + ["broken"]


@pytest.mark.parametrize("closes", [False, True])
def test_a_pause_before_the_next_try_ends_when_it_is_cancelled(closes: bool, server: Cloud) -> None:
    bounds = Bounds(time.monotonic() + 60, threading.Event())

    def busy() -> str:
        (bounds.closed if closes else bounds.cancelled).set()
        raise CloudError("there", "busy", "did not help", retryable=True, pause=50)

    began = time.monotonic()
    with pytest.raises(CancelledError, match="the pipeline was closed while" if closes else "cancelled while"):
        server.retried(busy, bounds)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("status", "reason", "again"),
    [
        (400, "refused", False),
        (401, "unauthorized", False),
        (408, "deadline", True),
        (409, "conflict", False),
        (429, "busy", True),
        (500, "failed", False),
        (502, "failed", True),
        (503, "unready", True),
        (504, "deadline", True),
    ],
)
def test_what_an_answer_means(status: int, reason: str, again: bool) -> None:
    headers = HTTPMessage()
    headers["Retry-After"] = "7"
    error = refused("there", Answer(status, "Why", headers, b'{"error": {"message": "so it is"}}'))
    assert (error.reason, error.retryable, error.pause) == (reason, again, 7.0)
    assert f"answered {status}: so it is" in str(error)
    assert "so it is" not in reason_alone(f"{reason}: {error}")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error": {"message": "models: another."}}', "there: answered 409: models: another."),
        (b"<html>", "there: answered 409: Not here."),
        (b'{"error": {"message": ""}}', "there: answered 409."),
    ],
)
def test_what_was_answered_ends_with_one_full_stop(body: bytes, told: str) -> None:
    assert str(refused("there", Answer(409, "Not here.", HTTPMessage(), body))) == told


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
