"""Attention as one node: recognised as exports write it, equal to it, and left alone where there is a mask."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tandemrt.engines.attention import fused_attention
from tandemrt.engines.job import Job
from tandemrt.engines.onnxruntime import build


def attention(heads: int = 4, width: int = 8, *, mask: bool = False, plain_key: bool = False) -> onnx.ModelProto:
    """Attention of `x` (B, S, C) to `text` (B, L, C) in the nodes that torch 2.13's exporter makes of it."""
    channels, random = heads * width, np.random.default_rng(0)
    tensors, nodes = [], []

    def constant(name: str, values: object, dtype: type) -> str:
        tensors.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=f"attn1/{output}", **attributes))
        return output

    apart = constant("apart", [0, -1, heads, width], np.int64)
    for name, given in (("q", "x"), ("k", "text"), ("v", "text")):
        weight = constant(f"w_{name}", random.standard_normal((channels, channels)) / channels**0.5, np.float32)
        node("MatMul", [given, weight], f"linear_{name}")
        node("Reshape", [f"linear_{name}", apart], f"view_{name}")
        node("Transpose", [f"view_{name}"], f"heads_{name}", perm=[0, 2, 1, 3])
    scale = constant("scale", [width**-0.25], np.float32)
    turned = "heads_k"
    if plain_key:
        turned = node("Transpose", ["heads_k"], "turned", perm=[0, 1, 3, 2])
    else:
        node("Reshape", ["heads_k", constant("flat", [-1, 5, width], np.int64)], "flat_k")
        node("Transpose", ["flat_k"], "flat_turned", perm=[0, 2, 1])
        turned = node("Reshape", ["flat_turned", constant("full", [-1, heads, width, 5], np.int64)], "turned")
    node("MatMul", [node("Mul", ["heads_q", scale], "sq"), node("Mul", [turned, scale], "sk")], "scores")
    masked = node("Add", ["scores", constant("mask", np.zeros((5,)), np.float32)], "masked") if mask else "scores"
    node("Softmax", [masked], "soft", axis=-1)
    node("MatMul", ["soft", "heads_v"], "weighted")
    node("Transpose", ["weighted"], "together", perm=[0, 2, 1, 3])
    node("Reshape", ["together", constant("whole", [0, -1, channels], np.int64)], "y")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size, channels])
        for name, size in (("x", "places"), ("text", 5), ("y", "places"))
    ]
    graph = helper.make_graph(nodes, "attention", ends[:2], ends[2:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ran(model: onnx.ModelProto, channels: int) -> np.ndarray:
    random = np.random.default_rng(1)
    feeds = {"x": random.standard_normal((2, 7, channels)), "text": random.standard_normal((2, 5, channels))}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: array.astype(np.float32) for name, array in feeds.items()})[0])


@pytest.mark.parametrize(("heads", "width"), [(4, 8), (1, 16)])
@pytest.mark.parametrize("plain_key", [False, True])
def test_one_node_gives_the_same_numbers(heads: int, width: int, plain_key: bool) -> None:
    model = attention(heads, width, plain_key=plain_key)
    before = model.SerializeToString()
    fused, count = fused_attention(model)
    assert count == 1
    assert model.SerializeToString() == before
    assert Counter(node.op_type for node in fused.graph.node) == {"MatMul": 3, "MultiHeadAttention": 1}
    np.testing.assert_allclose(ran(fused, heads * width), ran(model, heads * width), atol=1e-5)


def test_operators_of_onnxruntime_are_imported_once() -> None:
    model = attention()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    domains = [entry.domain for entry in fused_attention(model)[0].opset_import]
    assert domains.count("com.microsoft") == 1


def test_attention_with_a_mask_stays() -> None:
    model = attention(mask=True)
    fused, count = fused_attention(model)
    assert (count, fused) == (0, model)


@pytest.mark.parametrize(
    ("made", "order"),
    [("heads_q", [0, 1, 3, 2]), ("heads_v", [0, 1, 3, 2]), ("together", [0, 1, 3, 2]), ("turned", [0, 2, 1, 3])],
)
def test_axes_in_the_order_of_another_role_stay(made: str, order: list[int]) -> None:
    model = attention(4, 4, plain_key=True)
    (node,) = (node for node in model.graph.node if made in node.output)
    node.attribute[0].ints[:] = order
    assert fused_attention(model)[1] == 0


@pytest.mark.parametrize("read", ["soft", "together"])
def test_what_something_else_reads_stays(read: str) -> None:
    model = attention()
    model.graph.output.append(helper.make_tensor_value_info(read, TensorProto.FLOAT, None))
    assert fused_attention(model)[1] == 0


def test_an_engine_has_the_node_with_weights_beside_it(tmp_path: Path) -> None:
    model = attention(8, 16)
    (tmp_path / "made").mkdir()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    job = Job(
        component="unet", model=str(path), folder=str(tmp_path / "made"), backend="onnxruntime", device="cpu",
        precision="fp32", profiles=(), flags={},
    )  # fmt: skip
    kinds = {layer.kind for layer in build(job, lambda *_: None).layers}
    assert "com.microsoft.MultiHeadAttention" in kinds and "Softmax" not in kinds
    half = msgspec.structs.replace(job, precision="fp16")
    assert "Softmax" in {layer.kind for layer in build(half, lambda *_: None).layers}
