"""SmoothQuant: exact before anything is rounded, and what saves a graph with an outlier channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandemrt.calibrate.graph_writing import write_edited
from tandemrt.calibrate.int8 import Int8Settings, int8_plan, quantize_int8, watched
from tandemrt.calibrate.layers import layers_of
from tandemrt.calibrate.ranges import Limits, collect_ranges
from tandemrt.calibrate.smoothing import Smoothing, divisors_of, outlier_ratio, smoothed
from tandemrt.engines.graph_files import read_graph

from .small_graphs import OUTLIER, samples_of, write_block
from .test_int8 import ran, relative_rms

FEW = Limits(least_samples=1, threads=1)
CHANNEL = st.lists(st.floats(0, 1e4, width=32), min_size=3, max_size=3).map(lambda one: np.array(one, np.float32))


def stored(model: Path, name: str) -> np.ndarray:
    (tensor,) = (one for one in onnx.load(model).graph.initializer if one.name == name)
    return onnx.numpy_helper.to_array(tensor)


@settings(max_examples=40)
@example(np.ones(3, np.float32), np.full(3, 2.5e-41, np.float32), 0.0)
@given(CHANNEL, CHANNEL, st.floats(0, 1))
def test_divisors_are_powers_of_two_near_the_equation(x: np.ndarray, w: np.ndarray, alpha: float) -> None:
    found = divisors_of(x, w, alpha)
    assert (np.frexp(found)[0] == 0.5).all()
    known = (x > 0) & (w > 0)
    exact = alpha * np.log2(x[known].astype(float)) - (1 - alpha) * np.log2(w[known].astype(float))
    assert (np.abs(np.log2(found[known]) - exact.clip(-14, 14)) <= 0.5 + 1e-6).all()
    assert (found[~known] == 1).all()


def test_an_outlier_is_told_by_the_median() -> None:
    assert outlier_ratio(np.array([1, 2, 3, 30], np.float32)) == 12
    assert outlier_ratio(np.array([0, 0, 0, 1], np.float32)) == float("inf")


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("folded", [True, False], ids=["into the normalization", "in a node of its own"])
def test_a_smoothed_graph_gives_the_same_bits(half: bool, folded: bool, tmp_path: Path) -> None:
    model = write_block(tmp_path / "float", outlier=40, half=half)
    graph = read_graph(model)
    layers = layers_of(graph, "block")
    ranges = collect_ranges(model, watched(layers), samples_of(4), FEW)
    plan = int8_plan(graph, layers, ranges, Int8Settings(limits=FEW), model.parent)
    (found,) = plan.smoothings.items()
    assert found[0] == "normal"
    assert found[1].affine == ("norm.weight", "norm.bias")
    assert found[1].divisors.argmax() == OUTLIER
    smoothings = {"normal": found[1] if folded else Smoothing(found[1].divisors, ())}
    edited, edits = smoothed(graph, smoothings, layers)
    assert len(edited.graph.node) == len(graph.graph.node) + (not folded)
    write_edited(edited, edits, tmp_path / "smoothed" / "model.onnx", model.parent)
    np.testing.assert_array_equal(ran(tmp_path / "smoothed" / "model.onnx"), ran(model))
    found_weight, weight = (stored(path, "to_q.weight") for path in (tmp_path / "smoothed" / "model.onnx", model))
    np.testing.assert_array_equal(found_weight, weight * found[1].divisors[:, None])


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_smoothing_saves_what_an_outlier_channel_spoils(half: bool, tmp_path: Path) -> None:
    model = write_block(tmp_path / "float", outlier=200, half=half)
    errors = {}
    for alpha in (None, 0.5):
        out = tmp_path / str(alpha) / "model.onnx"
        settings = Int8Settings(observer="minmax", smoothing=alpha, limits=FEW)
        report = quantize_int8(model, samples_of(4), out, settings)
        assert report.settings["smoothed"] == (0 if alpha is None else 1)
        errors[alpha] = relative_rms(ran(out), ran(model))
    assert errors[0.5] < errors[None] / 3, errors


def test_a_normalization_that_others_read_stays(tmp_path: Path) -> None:
    """Where q, k and v are not all quantized, the values that they share are divided in a node of its own."""
    model = write_block(tmp_path / "float", outlier=200)
    out = tmp_path / "int8" / "model.onnx"
    quantize_int8(model, samples_of(4), out, Int8Settings(keep=("to_v/MatMul",), limits=FEW))
    nodes = {node.name: node for node in onnx.load(out).graph.node}
    assert nodes["normal/smoothed/Mul"].input[0] == "normal"
    assert nodes["to_v/MatMul"].input[0] == "normal"
    assert nodes["to_q/MatMul"].input[0] == nodes["to_k/MatMul"].input[0] == "normal/smoothed/dequantized"
    assert relative_rms(ran(out), ran(model)) < 0.05
