"""Estimates of builds: near what builds took, and falling and rising with what drives them."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from tandemrt.engines import estimate
from tandemrt.engines.estimate import estimated, memory_available_bytes

from .conftest import Requests


@pytest.mark.parametrize(
    ("target", "weights_bytes", "memory_bytes", "size_bytes"),
    [
        ("tensorrt-rtx:portable", 1_720_000_000, 6.1e9, 1.75e9),  # SD 1.5's UNet
        ("openvino:cpu", 162_118_226, 861e6, 169e6),  # SDXL's UNet at an eighth of its widths, as the next
        ("onnxruntime:cpu", 162_118_226, 455e6, 162.7e6),
    ],
)
def test_what_was_measured_is_estimated(
    target: str,
    weights_bytes: int,
    memory_bytes: float,
    size_bytes: float,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "weights_bytes", lambda request: weights_bytes)
    (request,) = requests(target, components=("unet",))
    found = estimated(request)
    assert found.memory_bytes == pytest.approx(memory_bytes, rel=0.15)
    assert found.size_bytes == pytest.approx(size_bytes, rel=0.05)


def test_more_of_anything_takes_more(requests: Requests) -> None:
    (one,) = requests("tensorrt-rtx:sm89", components=("unet",))
    (two,) = requests("tensorrt-rtx:sm89+sm120", components=("unet",))
    (both,) = requests("tensorrt-rtx:sm89", components=("unet",), profiles=("64", "128"))
    assert estimated(two).build_s > estimated(one).build_s
    assert estimated(both).build_s > estimated(one).build_s
    (full,) = requests("openvino:cpu", components=("unet",))
    half = replace(full, ingredients=msgspec.structs.replace(full.ingredients, precision="fp16"))
    assert estimated(half).memory_bytes > estimated(full).memory_bytes


def test_available_memory_is_told() -> None:
    available = memory_available_bytes()
    assert available is not None
    assert available > 1 << 20
