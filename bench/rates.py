"""What the machine can do at best, measured: products of large matrices, and copies of a large array.

Both run through the backend whose models are held to them, on the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Binding, Shape
from tandemrt.runtime.targets import Target

from .rounds import rotated

if TYPE_CHECKING:
    import onnx

# Products in a row: what goes in and out of the chain is little beside them.
CHAIN = 8
OPSET = 20
Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Options:
    """The side of a product's matrices, numbers that are copied, threads, and rounds that go before and count."""

    side: int
    copied: int
    threads: int | None
    warm_up: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does at best: floating-point operations a second, by precision, and bytes a second."""

    flops: Mapping[str, float]
    bytes: float

    @property
    def every(self) -> dict[str, float]:
        """All of them by what they are of: products by precision, and copies."""
        return {**{f"products, {precision}": rate for precision, rate in self.flops.items()}, "copies": self.bytes}

    def best(self, other: Rates) -> Rates:
        """The better of each of two measurements of the same."""
        flops = {precision: max(rate, other.flops[precision]) for precision, rate in self.flops.items()}
        return Rates(flops, max(self.bytes, other.bytes))


@dataclass(frozen=True, slots=True)
class Peaks:
    """Products by precision, and a copy, ready to be timed.

    flops, bytes: operations of a product's run, and what a copy's run reads and writes.
    """

    products: Mapping[str, Binding]
    copy: Binding
    flops: int
    bytes: int

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """The products in their order, then the copy."""
        return (*self.products.values(), self.copy)


def opened_peaks(target: Target, precisions: Iterable[str], options: Options) -> Peaks:
    """A product of each precision, and a copy, on a target.

    Raises:
        TargetError, ExecutionError: they cannot run there.
    """
    side, products = options.side, {}
    with TemporaryDirectory() as scratch:
        for precision in dict.fromkeys(precisions):
            path = _saved(product_graph(side, precision), Path(scratch, f"{precision}.onnx"))
            products[precision] = bound(path, replace(target, precision=precision), {"x": (side, side)}, options)
        path = _saved(copy_graph(options.copied), Path(scratch, "copy.onnx"))
        copy = bound(path, replace(target, precision="fp32"), {"x": (options.copied,)}, options)
    return Peaks(products, copy, 2 * CHAIN * side**3, 2 * 4 * options.copied)


def measured_rates(target: Target, precisions: Iterable[str], options: Options) -> Rates:
    """What the best rounds of products of these precisions, and of a copy, reach; raises as `opened_peaks`."""
    peaks = opened_peaks(target, precisions, options)
    *products, copy = (float(taken.min()) / 1e3 for taken in in_turns(peaks.bindings, options))
    flops = {precision: peaks.flops / best for precision, best in zip(peaks.products, products, strict=True)}
    return Rates(flops, peaks.bytes / copy)


def product_name(options: Options, precision: str) -> str:
    """What a product is called in a report."""
    return f"a product of {options.side} x {options.side}, {precision}"


def product_graph(side: int, precision: str) -> onnx.ModelProto:
    """`CHAIN` products of a (side, side) matrix with a weight of that shape, in float16 for fp16, else in float32.

    In int8 what every product reads goes through QuantizeLinear and DequantizeLinear.
    """
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = np.random.default_rng(0).standard_normal((side, side)) / side**0.5
    stored = [numpy_helper.from_array(weight.astype(dtype), "weight")]
    nodes, value, operand = [], "x", "weight"
    if precision == "int8":
        rounded = np.clip(np.rint(weight / np.abs(weight).max() * 127), -127, 127).astype(np.int8)
        scales = {"scale": np.float32(4 / 127), "weight_scale": np.float32(np.abs(weight).max() / 127)}
        stored = [numpy_helper.from_array(rounded, "weight"), numpy_helper.from_array(np.int8(0), "zero")]
        stored += [numpy_helper.from_array(np.asarray(one), name) for name, one in scales.items()]
        operand = "weight_float"
        nodes.append(helper.make_node("DequantizeLinear", ["weight", "weight_scale", "zero"], [operand]))
    for index in range(CHAIN):
        read = value
        if precision == "int8":
            read = f"{value}_float"
            nodes.append(helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{value}_int8"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{value}_int8", "scale", "zero"], [read]))
        value = f"y{index}"
        nodes.append(helper.make_node("MatMul", [read, operand], [value]))
    return _model(nodes, (side, side), kind, value, stored)


def copy_graph(numbers: int) -> onnx.ModelProto:
    """Float32 numbers, read and written with their sign changed: a plain copy is left out by backends."""
    from onnx import TensorProto, helper  # noqa: PLC0415

    return _model([helper.make_node("Neg", ["x"], ["y"])], (numbers,), TensorProto.FLOAT, "y", [])


def _model(
    nodes: list[onnx.NodeProto], shape: Shape, kind: int, made: str, stored: list[onnx.TensorProto]
) -> onnx.ModelProto:
    from onnx import helper  # noqa: PLC0415

    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", made)]
    graph = helper.make_graph(nodes, "limit", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def bound(model: Path, target: Target, shapes: Mapping[str, Shape], options: Options) -> Binding:
    """A binding of a model whose inputs are noise, or the time step 500, or token 0."""
    binding = open_session(model, target, threads=options.threads).bind(shapes)
    random = np.random.default_rng(0)
    for name, array in binding.inputs.items():
        if name == "timestep":
            array[...] = 500
        elif array.dtype.kind == "f":
            array[...] = random.standard_normal(array.shape)
    return binding


def in_turns(bindings: Sequence[Binding], options: Options) -> list[Times]:
    """Milliseconds of each binding's runs, (repeats,) float64; every round begins with the next binding."""
    taken: list[list[float]] = [[] for _ in bindings]
    for round_ in range(options.warm_up + options.repeats):
        for binding, kept in rotated(tuple(zip(bindings, taken, strict=True)), round_):
            began = time.perf_counter()
            binding.run()
            if round_ >= options.warm_up:
                kept.append((time.perf_counter() - began) * 1e3)
    return [np.array(kept) for kept in taken]
