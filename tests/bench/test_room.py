"""Memory: what contenders need at least, and whether it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.bench import room
from tandemrt.bench.room import Room, Weights, weights_of
from tandemrt.bench.sizes import stored_bytes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BenchmarkError

from ..runtime.tiny_bundle import call_quantized, write_tiny_bundle


def test_weights_are_counted_as_they_are_computed_with(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path)
    bundle = Bundle.open(tmp_path)
    counts = {name: one.parameters for name, one in bundle.manifest.components.items()}
    weights = weights_of(bundle, ("unet", "vae_decoder"))
    assert weights == Weights(counts["unet"] + counts["vae_decoder"], 0)
    assert weights.held_on("openvino:cpu") == weights.held_on("onnxruntime:cpu:fp16") == 4 * weights.parameters
    assert weights.held_on("openvino:cpu:bf16") == 2 * weights.parameters
    assert weights.held_on("onnxruntime:cuda") == 0
    call_quantized(tmp_path, "int8-weights", "unet")
    bundle = Bundle.open(tmp_path)
    assert weights_of(bundle, ("unet", "vae_decoder")) == Weights(counts["vae_decoder"], stored_bytes(bundle, "unet"))


def test_room_is_for_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda _: 10 * 10**9)
    left = Room()
    left.require("a", 10 * 10**9)
    left.take(7 * 10**9)
    with pytest.raises(BenchmarkError, match=r"b: its weights alone take 4\.0 GB of memory, and 3\.0 GB are left"):
        left.require("b", 4 * 10**9)
    left.require("c", 3 * 10**9)


def test_where_the_system_does_not_tell_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda _: None)
    left = Room()
    left.take(1)
    left.require("a", 10**18)
