"""Whose turn it is on engines that hold LoRAs in their weights; the engines are lists of what they were given."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import refits
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError, CancelledError, ExecutionError
from tandemrt.runtime.lora_slots import Adapter, LowRank
from tandemrt.runtime.refits import Loras, Refits

from .tiny_bundle import write_tiny_bundle

LONG_S = 20.0


def loras(name: str, scale: float = 1.0) -> Loras:
    change = LowRank(np.ones((1, 8), np.float32), np.ones((8, 1), np.float32))
    return {"unet": (Adapter(name, {"matmul_1": change}, scale),)}


NONE: Loras = {}
A, B, C = (loras(name) for name in "abc")


class Engine:
    """What can be refitted, and what it was last given; `fails` may be set."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.fails = self.closed = False

    def refit(self, base: Any, changes: Any) -> None:
        self.given.append(len(changes))
        if self.fails:
            raise ExecutionError("unet", "out of memory")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_tiny_bundle(tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def gate(bundle: Bundle) -> Refits:
    return Refits(bundle)


def found(*, refittable: bool = True) -> Any:
    return SimpleNamespace(engine=SimpleNamespace(ingredients=SimpleNamespace(refittable=refittable)))


def events(*made: Any) -> Iterator[Any]:
    yield from made
    return "done"


def begun(gate: Refits, wanted: Loras, before: Callable[[], None] = lambda: None) -> Any:
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


def test_engines_are_refitted_only_when_the_loras_are_others(gate: Refits) -> None:
    engine, other = Engine(), Engine()

    def run(wanted: Loras) -> None:
        begun(gate, wanted).close()

    first = begun(gate, NONE)
    gate.opened("unet", found(), engine)  # type: ignore[arg-type]
    gate.opened("vae_decoder", found(refittable=False), other)  # type: ignore[arg-type]
    first.close()
    for wanted in (NONE, A, A, loras("a", 0.5), B, NONE, loras("a", 0.0), NONE):
        run(wanted)
    assert engine.given == [1, 1, 1, 0]
    assert other.given == []
    late = Engine()
    generation = begun(gate, A)
    gate.opened("unet", found(), late)  # type: ignore[arg-type]
    for session in (late, late, other):
        gate.ready(session)  # type: ignore[arg-type]
    generation.close()
    assert (late.given, other.given) == ([1], [])


def test_one_that_could_not_be_refitted_is_made_anew(gate: Refits) -> None:
    engine = Engine()
    generation = begun(gate, NONE)
    gate.opened("unet", found(), engine)  # type: ignore[arg-type]
    generation.close()
    engine.fails = True
    for wanted in (A, A, NONE):
        with pytest.raises(ExecutionError, match="out of memory"):
            begun(gate, wanted)
    engine.fails = False
    begun(gate, NONE).close()
    begun(gate, NONE).close()
    assert engine.given == [1, 1, 0, 0]
    late = Engine()
    late.fails = True
    generation = begun(gate, A)
    gate.opened("unet", found(), late)  # type: ignore[arg-type]
    with pytest.raises(ExecutionError, match="out of memory"):
        gate.ready(late)  # type: ignore[arg-type]
    generation.close()
    late.fails = False
    begun(gate, NONE).close()
    assert (late.given, late.closed) == ([1, 0], False)


def test_weights_of_a_bundle_that_changed_are_not_read(gate: Refits, bundle: Bundle) -> None:
    generation = begun(gate, NONE)
    gate.opened("unet", found(), Engine())  # type: ignore[arg-type]
    generation.close()
    weights = bundle.model_path("unet").parent / "model.onnx.data"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        begun(gate, A)


def test_turns_are_had_in_the_order_they_were_asked_for(gate: Refits, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wants what runs does not go before one that waits, which would else wait for ever."""
    monkeypatch.setattr(refits, "PATIENCE_S", 60.0)
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


def test_one_that_is_put_aside_lets_others_go_first(gate: Refits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refits, "PATIENCE_S", 0.05)
    engine, aside = Engine(), begun(gate, A)
    gate.opened("unet", found(), engine)  # type: ignore[arg-type]
    gate.ready(engine)  # type: ignore[arg-type]
    list(begun(gate, B))
    assert list(aside) == [2, 3]
    assert engine.given == [1, 1, 1]


def test_one_that_runs_is_waited_for(gate: Refits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refits, "PATIENCE_S", 0.0)
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


def test_one_that_waits_asks_whether_it_is_to_end(gate: Refits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refits, "PATIENCE_S", 60.0)
    ahead = begun(gate, A)

    def cancelled() -> None:
        raise CancelledError("generation", "cancelled")

    with pytest.raises(CancelledError):
        begun(gate, B, cancelled)
    assert list(ahead) == [2, 3]
    begun(gate, B).close()
