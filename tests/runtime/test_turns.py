"""Whose turn it is where generations of one set of LoRAs alone run beside each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tandemrt.runtime import turns
from tandemrt.runtime.errors import CancelledError
from tandemrt.runtime.refits import Loras
from tandemrt.runtime.turns import Turns

from .lora_sets import A, B, C

LONG_S = 20.0


@pytest.fixture
def gate() -> Turns:
    return Turns(lambda _: None)


def events(*made: Any) -> Iterator[Any]:
    yield from made
    return "done"


def begun(gate: Turns, wanted: Loras, before: Callable[[], None] = lambda: None) -> Any:
    """A generation that has its turn."""
    generation: Any = gate.in_turn(wanted, events(1, 2, 3), before)  # type: ignore[arg-type]
    assert next(generation) == 1
    return generation


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(work()), daemon=True)
    thread.start()
    return thread, made


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_turns_are_had_in_the_order_they_were_asked_for(gate: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wants what runs does not go before one that waits, which would else wait for ever."""
    monkeypatch.setattr(turns, "PATIENCE_S", 60.0)
    order: list[str] = []
    first, beside = begun(gate, A), begun(gate, A)

    def waiting(name: str, wanted: Loras) -> threading.Thread:
        def work() -> None:
            generation = begun(gate, wanted)
            order.append(name)
            list(generation)

        count = len(gate._waiting)
        thread, _ = in_thread(work)
        until(lambda: len(gate._waiting) == count + 1)
        return thread

    threads = [waiting("b", B), waiting("a", A), waiting("c", C)]
    list(first)
    time.sleep(0.1)
    assert order == []
    list(beside)
    for thread in threads:
        thread.join(LONG_S)
    assert order == ["b", "a", "c"]


def test_one_that_is_put_aside_lets_others_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.05)
    given = list[Loras]()
    gate = Turns(given.append)
    aside = begun(gate, A)
    list(begun(gate, B))
    assert list(aside) == [2, 3]
    assert given == [A, B, A]


def test_one_that_runs_is_waited_for(gate: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.0)
    running, go_on = threading.Event(), threading.Event()

    def made() -> Iterator[int]:
        running.set()
        go_on.wait(LONG_S)
        yield 1

    slow, ended = in_thread(lambda: list(gate.in_turn(A, made(), lambda: None)))  # type: ignore[arg-type]
    running.wait(LONG_S)
    other, begins = in_thread(lambda: begun(gate, B))
    until(lambda: bool(gate._waiting))
    time.sleep(0.1)
    assert begins == []
    go_on.set()
    slow.join(LONG_S)
    other.join(LONG_S)
    assert (len(begins), ended) == (1, [[1]])


def test_who_is_advanced_beside_another_is_noticed(gate: Turns) -> None:
    """As one sees it that is advanced itself."""
    marks: list[int | None] = []

    def watching(meanwhile: Callable[[], object]) -> list[int | None]:
        def mark() -> Iterator[int]:
            marks.append(gate.alone())
            meanwhile()
            marks.append(gate.alone())
            yield 1

        marks.clear()
        next(gate.in_turn({}, mark(), lambda: None))  # type: ignore[arg-type]
        return list(marks)

    aside: Any = gate.in_turn({}, events(1, 2, 3), lambda: None)  # type: ignore[arg-type]
    first, second = watching(lambda: None)
    assert first is not None
    assert first == second
    for _ in range(2):  # it begins, and goes on
        first, second = watching(lambda: next(aside))
        assert first != second
    first, second = watching(lambda: None)
    assert first is not None
    assert first == second

    def both() -> Iterator[int]:
        marks.append(gate.alone())
        yield 1

    watching(lambda: next(gate.in_turn({}, both(), lambda: None)))  # type: ignore[arg-type]
    assert marks[1] is None


def test_one_that_waits_asks_whether_it_is_to_end(gate: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 60.0)
    ahead = begun(gate, A)

    def cancelled() -> None:
        raise CancelledError("generation", "cancelled")

    with pytest.raises(CancelledError):
        begun(gate, B, cancelled)
    assert list(ahead) == [2, 3]
    begun(gate, B).close()
