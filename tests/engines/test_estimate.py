"""Estimates of builds: near what builds took, and falling and rising with what drives them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tandemrt.engines import estimate
from tandemrt.engines.estimate import estimated, largest_calls, memory_bytes

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
    half = replace(half, facts=msgspec.structs.replace(full.facts, precision="fp16"))
    assert estimated(half).size_bytes > estimated(full).size_bytes


def test_times_and_memory_are_near_those_of_bench(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the builds measured at true size, in fp16; `nodes` are those of their graphs."""
    nodes = {("hybrid-sd-fp16", "unet"): 1866, ("sdxs-512-0.9-fp16", "unet"): 1037, ("sdxl-fp16", "unet"): 4600}
    evidence = Path(__file__).resolve().parents[2] / "bench" / "evidence"
    for file in ("engine_builds.json", "engine_builds_sdxl.json"):
        for row in json.loads((evidence / file).read_text("utf-8"))["builds"]:
            count = nodes.get((row["bundle"], row["component"]))
            if count is None:
                continue
            on_a_processor = row["target"].endswith(":cpu")
            stored = row["size_mb"] * 1e6 / (2 if on_a_processor else 1)
            monkeypatch.setattr(estimate, "weights_bytes", lambda request, stored=stored: stored)
            monkeypatch.setattr(estimate, "node_count", lambda model, count=count: count)
            (request,) = requests(row["target"], components=("unet",))
            found = estimated(replace(request, facts=msgspec.structs.replace(request.facts, precision="fp16")))
            assert found.build_s == pytest.approx(row["build_s"], rel=0.35), row
            assert found.memory_bytes == pytest.approx(row["peak_gib"] * 2**30, rel=0.2), row


def test_available_memory_is_told() -> None:
    available, total = memory_bytes("MemAvailable"), memory_bytes("MemTotal")
    assert available is not None
    assert total is not None
    assert 1 << 20 < available <= total


@pytest.mark.parametrize("target", ["tensorrt-rtx:sm89", "onnxruntime:cpu", "openvino:cpu"])
def test_larger_calls_take_more(target: str, requests: Requests) -> None:
    made = requests(target, components=("unet",), profiles=("64:guided", "128:guided"))
    small, large = (call for request in made for call in largest_calls(request))
    assert (small.profile, large.profile) == ("64:guided", "128:guided")
    assert large.estimated_memory_bytes == pytest.approx(4 * small.estimated_memory_bytes, rel=0.1)
    assert 3.5 * small.multiply_adds < large.multiply_adds < 4 * small.multiply_adds


def test_bfloat16_halves_a_calls_memory(requests: Requests) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",))
    half = replace(request, ingredients=msgspec.structs.replace(request.ingredients, precision="bf16"))
    (full,), (less,) = largest_calls(request), largest_calls(half)
    assert less.estimated_memory_bytes < 0.6 * full.estimated_memory_bytes


def test_a_call_is_held_to_the_memory_of_the_machine_it_runs_on(
    requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "memory_bytes", lambda kind: 30_000)
    (here,), (elsewhere,) = (
        largest_calls(requests(target, components=("unet",), profiles=("128",))[0])
        for target in ("openvino:cpu", "tensorrt-rtx:sm89")
    )
    assert here.exceeds_memory
    assert not elsewhere.exceeds_memory
