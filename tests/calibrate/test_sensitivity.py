"""The sweep for the layers that hurt most."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tandemrt.calibrate.int8 import Int8Plan, Int8Settings, int8_plan, quantize_int8, watched
from tandemrt.calibrate.layers import layers_of
from tandemrt.calibrate.ledger import Ledger
from tandemrt.calibrate.ranges import Limits, collect_ranges
from tandemrt.calibrate.sensitivity import Sensitivity, Sweep, worst_layers
from tandemrt.engines.graph_files import read_graph

from .small_graphs import samples_of, write_block
from .test_int8 import FEEDS, LAYERS, ran, relative_rms

FEW = Limits(least_samples=1, threads=1)


def planned(model: Path, settings: Int8Settings) -> Int8Plan:
    graph = read_graph(model)
    layers = layers_of(graph, "block")
    ranges = collect_ranges(model, watched(layers), samples_of(4), settings.limits)
    return int8_plan(graph, layers, ranges, settings, model.parent)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_a_planted_layer_is_found_first(half: bool, tmp_path: Path) -> None:
    model = write_block(tmp_path / "float", half=half, fragile=True)
    plan = planned(model, Int8Settings(observer="minmax", limits=FEW))
    with Ledger(tmp_path / "found", {}) as ledger:
        (worst,) = islice(worst_layers(Sweep(model, plan, list(samples_of(2)()), 1), ledger), 1)
        assert worst.layers == ("conv_out/Conv",)
        assert len(ledger) < 2 * len(LAYERS) - 1
        every = list(worst_layers(Sweep(model, plan, list(samples_of(2)()), 1), ledger))
    assert every[0] == worst
    assert {name for one in every for name in one.layers} == set(LAYERS)


def test_an_error_is_the_one_of_the_graph_with_that_layer_quantized(tmp_path: Path) -> None:
    """Smoothed layers too: what the sweep measures is what quantizing the layer does."""
    model = write_block(tmp_path / "float", outlier=200)
    settings = Int8Settings(smoothing=0.5, limits=FEW)
    plan = planned(model, settings)
    assert set(plan.smoothings) == {"normal"}
    with Ledger(tmp_path / "found", {}) as ledger:
        every = list(worst_layers(Sweep(model, plan, [FEEDS], 1), ledger))
        together = ledger.get(f"float, layers 0:{len(LAYERS)}")
    found = {one.layers[0]: one.error for one in every}
    assert [one.share for one in every] == pytest.approx([(one.error / together) ** 2 for one in every])
    quantize_int8(model, samples_of(4), tmp_path / "all" / "model.onnx", settings)
    assert together == pytest.approx(relative_rms(ran(tmp_path / "all" / "model.onnx"), ran(model)), rel=0.02)
    for name in ("conv_in/Conv", "proj/MatMul", "conv_out/Conv"):
        kept = tuple(one for one in LAYERS if one != name)
        out = tmp_path / name / "model.onnx"
        quantize_int8(model, samples_of(4), out, Int8Settings(keep=kept, limits=FEW))
        assert found[name] == pytest.approx(relative_rms(ran(out), ran(model)), rel=0.02)


def test_a_sweep_is_taken_up_where_it_was_left(tmp_path: Path) -> None:
    model = write_block(tmp_path / "float")
    plan = planned(model, Int8Settings(limits=FEW))

    class Stopped(Exception):  # noqa: N818 (no error)
        pass

    def stopping(label: str, done: int, total: int) -> None:
        assert (label, total) == ("float: layers", 2 * len(LAYERS) - 1)
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped), Ledger(tmp_path / "found", {}) as ledger:
        list(worst_layers(Sweep(model, plan, [FEEDS], 1), ledger, stopping))
    measured: list[int] = []
    with Ledger(tmp_path / "found", {}) as ledger:
        assert len(ledger) == 4
        sweep = Sweep(model, plan, [FEEDS], 1)
        resumed = list(worst_layers(sweep, ledger, lambda label, done, total: measured.append(done)))
        assert measured == list(range(4, 2 * len(LAYERS) - 1))
        # All is known by now: no graph is loaded, and none is needed.
        gone = Sweep(tmp_path / "float" / "gone.onnx", plan, [])
        assert list(worst_layers(gone, ledger)) == resumed
    with Ledger(tmp_path / "other", {}) as ledger:
        assert list(worst_layers(Sweep(model, plan, [FEEDS], 1), ledger)) == resumed
    assert resumed == sorted(resumed, key=lambda one: -one.error)
    assert all(np.isfinite(one.error) and isinstance(one, Sensitivity) for one in resumed)


def test_a_layer_that_overflows_is_the_worst(tmp_path: Path) -> None:
    """Infinity is no number that JSON has: what is lost altogether is told as a large one."""
    model = write_block(tmp_path / "float")
    plan = planned(model, Int8Settings(limits=FEW))
    reads = next(one.reads for one in plan.layers if one.name == "conv_in/Conv")
    broken = dataclasses.replace(plan, scales={**plan.scales, reads: float("inf")})
    with Ledger(tmp_path / "found", {}) as ledger:
        (worst,) = islice(worst_layers(Sweep(model, broken, [FEEDS], 1), ledger), 1)
    assert (worst.layers, worst.error) == (("conv_in/Conv",), 1e6)
