"""Bundles of random weights are known by their graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tandemrt.bench.random_weights import has_random_weights, untrained
from tandemrt.runtime.bundle import Bundle


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("trained", [0, 1])
def test_weights_of_presets_are_known_by_their_biases(tmp_path: Path, dtype: type, trained: int) -> None:
    """Of a module's weights as presets are written; `trained` biases are of another distribution."""
    torch, load_file = pytest.importorskip("torch"), pytest.importorskip("safetensors.numpy").load_file
    from tandemrt.export.random_weights import write_weights  # noqa: PLC0415 — torch

    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))]
    write_weights(torch.nn.Sequential(*layers), tmp_path / "weights.safetensors", "a model")
    weights = {name: value.astype(dtype) for name, value in load_file(tmp_path / "weights.safetensors").items()}
    for name in list(weights)[1 : 1 + trained]:
        weights[name] = (0.1 * np.arange(16)).astype(dtype)
    weights |= {"frequencies": np.ones(16, dtype), "of few": np.arange(4).astype(dtype)}
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    output = helper.make_tensor_value_info("y", kind, [16])
    nodes = [helper.make_node("Identity", ["0.bias"], ["y"])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [output], stored)), tmp_path / "model.onnx")
    assert untrained(tmp_path / "model.onnx") is (trained == 0)


def test_trained_weights_are_not_random(shapes_bundle: Path) -> None:
    assert not has_random_weights(Bundle.open(shapes_bundle))
