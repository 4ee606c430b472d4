"""Graphs of a few layers with what a denoiser has: convolutions, a normalization, products with weights, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
CHANNELS, SIDE = 16, 8
OUTLIER = 3  # the channel that the normalization makes large


def write_block(
    folder: Path,
    *,
    half: bool = False,
    outlier: float = 1.0,
    fragile: bool = False,
    shared: bool = False,
    opset: int = 20,
) -> Path:
    """conv_in, a normalization, q, k and v, attention, proj, conv_out; weights over a kilobyte beside the model.

    half: weights and arithmetic in float16, inputs and outputs in float32.
    outlier: what the normalization multiplies one channel by; its weights in q, k and v are as much smaller.
    fragile: conv_out reads values of which one is a thousand times the others, its weights as much smaller.
    shared: k is made with the weight of q.
    """
    made = _Made(np.random.default_rng(5), TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    sample = made.cast("sample", "sample/inside") if half else "sample"
    hidden = made.conv("conv_in", sample, 4, CHANNELS)
    hidden = made.node("Add", [hidden, made.time_embedding()], "timed")
    flat = made.node("Reshape", [hidden, made.ints("flat", [0, CHANNELS, -1])], "flat")
    tokens = made.node("Transpose", [flat], "tokens", perm=[0, 2, 1])
    scales = np.ones(CHANNELS)
    scales[OUTLIER] = outlier
    normal = [tokens, made.floats("norm.weight", scales), made.floats("norm.bias", np.zeros(CHANNELS))]
    tokens = made.node("LayerNormalization", normal, "normal", axis=-1)
    rows = 1 / scales[:, None]
    q = made.product("to_q", tokens, rows)
    k = (
        made.node("MatMul", [tokens, "to_q.weight"], "to_k", name="to_k/MatMul")
        if shared
        else made.product("to_k", tokens, rows)
    )
    v = made.product("to_v", tokens, rows)
    scores = made.node("MatMul", [q, made.node("Transpose", [k], "turned", perm=[0, 2, 1])], "scores")
    attended = made.node("MatMul", [made.node("Softmax", [scores], "shares", axis=-1), v], "attended")
    projected = made.product("proj", attended, np.ones((CHANNELS, 1)))
    turned = made.node("Transpose", [projected], "back", perm=[0, 2, 1])
    hidden = made.node("Reshape", [turned, made.ints("picture", [0, CHANNELS, SIDE, SIDE])], "shaped")
    tall = np.ones((1, CHANNELS, 1, 1))
    tall[0, OUTLIER] = 1000 if fragile else 1
    if fragile:
        hidden = made.node("Mul", [hidden, made.floats("tall", tall)], "fragile")
    made.conv("conv_out", hidden, CHANNELS, 4, output="out" if half else "out_sample", columns=1 / tall)
    if half:
        made.cast("out", "out_sample", TensorProto.FLOAT)
    return made.write(folder, opset)


def samples_of(count: int, seed: int = 0) -> Callable[[], Iterator[dict[str, Array]]]:
    """What the block is given, so many times; the same at every call."""

    def samples() -> Iterator[dict[str, Array]]:
        random = np.random.default_rng(seed)
        for index in range(count):
            yield {
                "sample": random.standard_normal((2, 4, SIDE, SIDE)).astype(np.float32),
                "timestep": np.array([index / max(count, 1)], np.float32),
            }

    return samples


class _Made:
    def __init__(self, random: np.random.Generator, elem_type: int) -> None:
        self._random, self._type = random, elem_type
        self._dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[TensorProto] = []

    def node(self, kind: str, reads: list[str], output: str, **attributes: Any) -> str:
        name = attributes.pop("name", f"{output}/{kind}")
        self._nodes.append(helper.make_node(kind, reads, [output], name=name, **attributes))
        return output

    def cast(self, read: str, output: str, to: int | None = None) -> str:
        return self.node("Cast", [read], output, to=to or self._type)

    def floats(self, name: str, values: Array) -> str:
        self._tensors.append(numpy_helper.from_array(np.asarray(values, self._dtype), name))
        return name

    def ints(self, name: str, values: list[int]) -> str:
        self._tensors.append(numpy_helper.from_array(np.array(values, np.int64), f"{name}/shape"))
        return f"{name}/shape"

    def conv(
        self, name: str, read: str, given: int, made: int, *, output: str = "", columns: Array | float = 1.0
    ) -> str:
        weight = self._random.standard_normal((made, given, 3, 3)) / np.sqrt(given * 9) * columns
        reads = [read, self.floats(f"{name}.weight", weight), self.floats(f"{name}.bias", np.full(made, 0.1))]
        return self.node("Conv", reads, output or name, name=f"{name}/Conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def product(self, name: str, read: str, rows: Array) -> str:
        weight = self._random.standard_normal((CHANNELS, CHANNELS)) / np.sqrt(CHANNELS) * rows
        return self.node("MatMul", [read, self.floats(f"{name}.weight", weight)], name, name=f"{name}/MatMul")

    def time_embedding(self) -> str:
        read = "timestep" if self._type == TensorProto.FLOAT else self.cast("timestep", "timestep/inside")
        column = self.node("Unsqueeze", [read, self.ints("column", [1])], "column")
        weight = self.floats("time.weight", self._random.standard_normal((1, CHANNELS)))
        bias = self.floats("time.bias", np.zeros(CHANNELS))
        row = self.node("Gemm", [column, weight, bias], "time", name="time/Gemm")
        return self.node("Reshape", [row, self.ints("time", [1, CHANNELS, 1, 1])], "times")

    def write(self, folder: Path, opset: int) -> Path:
        graph = helper.make_graph(
            self._nodes,
            "block",
            [
                helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", 4, SIDE, SIDE]),
                helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
            ],
            [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, ["batch", 4, SIDE, SIDE])],
            self._tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.onnx"
        options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 1024}
        onnx.save_model(onnx.shape_inference.infer_shapes(model), str(path), **options)
        return path
