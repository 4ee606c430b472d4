"""Engines that hold LoRAs in their weights; they are lists of what they were given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError, ExecutionError
from tandemrt.runtime.refits import Refits

from .lora_sets import NONE, A, B, loras
from .tiny_bundle import write_tiny_bundle


class Engine:
    """What can be refitted, and what it was last given; `fails` may be set."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.fails = False

    def refit(self, base: Any, changes: Any) -> None:
        self.given.append(len(changes))
        if self.fails:
            raise ExecutionError("unet", "out of memory")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_tiny_bundle(tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def refits(bundle: Bundle) -> Refits:
    return Refits(bundle)


def found(*, refittable: bool = True) -> Any:
    return SimpleNamespace(engine=SimpleNamespace(ingredients=SimpleNamespace(refittable=refittable)))


def test_engines_are_refitted_only_when_the_loras_are_others(refits: Refits) -> None:
    engine, other, late = Engine(), Engine(), Engine()
    refits.opened("unet", found(), engine)  # type: ignore[arg-type]
    refits.opened("vae_decoder", found(refittable=False), other)  # type: ignore[arg-type]
    for wanted in (NONE, A, A, loras("a", 0.5), B, NONE, loras("a", 0.0), NONE):
        refits.hold(wanted)
    assert (engine.given, other.given) == ([1, 1, 1, 0], [])
    refits.hold(A)
    refits.opened("unet", found(), late)  # type: ignore[arg-type]
    assert late.given == []
    for session in (late, late, other):
        refits.ready(session)  # type: ignore[arg-type]
    assert (late.given, other.given) == ([1], [])


def test_one_that_could_not_be_refitted_is_made_anew(refits: Refits) -> None:
    engine, late = Engine(), Engine()
    refits.opened("unet", found(), engine)  # type: ignore[arg-type]
    engine.fails = True
    for wanted in (A, A, NONE):
        with pytest.raises(ExecutionError, match="out of memory"):
            refits.hold(wanted)
    engine.fails = False
    refits.hold(NONE)
    refits.hold(NONE)
    assert engine.given == [1, 1, 0, 0]
    late.fails = True
    refits.hold(A)
    refits.opened("unet", found(), late)  # type: ignore[arg-type]
    with pytest.raises(ExecutionError, match="out of memory"):
        refits.ready(late)  # type: ignore[arg-type]
    late.fails = False
    refits.hold(NONE)
    assert late.given == [1, 0]


def test_weights_of_a_bundle_that_changed_are_not_read(refits: Refits, bundle: Bundle) -> None:
    refits.opened("unet", found(), Engine())  # type: ignore[arg-type]
    weights = bundle.model_path("unet").parent / "model.onnx.data"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        refits.hold(A)
