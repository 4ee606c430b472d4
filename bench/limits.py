"""How near a bundle's models come to what the machine can do.

The limit is measured, not looked up: what a chain of large matrix products and what a copy of a large array reach
through the same backend, in turns with the models. A call takes no less than its floating-point operations at the one
rate, and than its bytes at the other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tandemrt.engines.calls import call_of
from tandemrt.engines.graph_files import read_graph
from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Binding, Shape
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.onnx_files import external_files
from tandemrt.runtime.targets import Target

from .reports.schema import Column, Figure, Row, Section, Unit

if TYPE_CHECKING:
    import onnx

# Products in a row: what goes in and out of the chain is little beside them.
CHAIN = 8
OPSET = 20
Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot do without: floating-point operations, two a multiply-add, and bytes read or written once.

    The bytes are those of the weights as they are stored, and of inputs and outputs.
    """

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Options:
    """The side of a product's matrices, numbers that are copied, threads, and rounds that go before and count."""

    side: int
    copied: int
    threads: int | None
    warm_up: int
    repeats: int


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


def work_of(bundle: Bundle, name: str, shapes: Mapping[str, Shape], binding: Binding) -> Work:
    """The work of a call of component `name` whose inputs have these shapes.

    Raises:
        BundleError: the shapes of the graph's values cannot be told.
    """
    model = bundle.model_path(name)
    call = call_of(read_graph(model), shapes, name)
    if call is None:
        raise BundleError(name, "shapes of its values cannot be told, nor its work counted", remedy="Leave it out.")
    files = (model, *(model.parent / one for one in external_files(model)))
    arrays = (*binding.inputs.values(), *binding.outputs.values())
    total = sum(path.stat().st_size for path in files) + sum(array.nbytes for array in arrays)
    return Work(2 * call.multiply_adds, total)


@dataclass(frozen=True, slots=True)
class Opened:
    """A component that is ready to run: the precision it computes in, and the work of a call."""

    precision: str
    work: Work
    binding: Binding


def opened(bundle: Bundle, name: str, target: Target, profile: str, options: Options) -> Opened:
    """Component `name` at what a profile is tuned for.

    Raises:
        TargetError, ExecutionError: it cannot run on the target.
        ArgumentError: the profile is none, or outside the model.
    """
    component = bundle.component(name)
    own = target.of_component(component)
    ranges = input_ranges(name, component, bundle.manifest, parse_profile(profile))
    shapes = {one: sizes.opt for one, sizes in ranges.items()}
    binding = _bound(bundle.model_path(name), own, shapes, options)
    return Opened(own.precision or component.computes_in, work_of(bundle, name, shapes, binding), binding)


def limits_section(bundle: Bundle, target: Target, names: Sequence[str], profile: str, options: Options) -> Section:
    """The machine's rates, and of each component the work, milliseconds a call, and share of the limit by round.

    Raises:
        BundleError, TargetError, ExecutionError, ArgumentError: as `opened` and `work_of`.
    """
    models = {name: opened(bundle, name, target, profile, options) for name in names}
    precisions = tuple(dict.fromkeys(model.precision for model in models.values()))
    side, products = options.side, {}
    with TemporaryDirectory() as scratch:
        for precision in precisions:
            path = _saved(product_graph(side, precision), Path(scratch, f"{precision}.onnx"))
            products[precision] = _bound(path, replace(target, precision=precision), {"x": (side, side)}, options)
        path = _saved(copy_graph(options.copied), Path(scratch, "copy.onnx"))
        copy = _bound(path, replace(target, precision="fp32"), {"x": (options.copied,)}, options)
        every = [*products.values(), copy, *(model.binding for model in models.values())]
        spent = iter(_in_turns(every, options))
    flops_per_ms = {precision: 2 * CHAIN * side**3 / next(spent) for precision in precisions}
    bytes_per_ms = 2 * 4 * options.copied / next(spent)
    rows = [
        _row(name, model, next(spent), (flops_per_ms[model.precision], bytes_per_ms)) for name, model in models.items()
    ]
    rates = [
        Row(name=f"a product of {side} x {side}, {one}", figures={"gflops": _figure("GFLOP/s", rate / 1e6)})
        for one, rate in flops_per_ms.items()
    ]
    rates.append(Row(name="a copy", figures={"gbytes": _figure("GB/s", bytes_per_ms / 1e6)}))
    return Section(
        key=f"limits {target}",
        title=f"The limit on {target}",
        columns=(
            Column(of="flops", title="GFLOP"),
            Column(of="bytes", title="MB at least"),
            Column(of="call", title="ms a call"),
            Column(of="gflops", title="GFLOP/s"),
            Column(of="gbytes", title="GB/s"),
            Column(of="share", title="of the limit"),
        ),
        rows=(*rows, *rates),
        note=f"One call each, {profile}. The limit is the machine's own: what a chain of {CHAIN} matrix products and a "
        "copy of a large array reach through the same backend in the same round. A call takes no less than its "
        "operations at the one rate, and than its bytes (weights, inputs and outputs, once) at the other. Above 1 is "
        "a model whose operations the backend does in fewer, as convolutions can be.",
    )


def _row(name: str, model: Opened, taken: Times, rates: tuple[Times, Times]) -> Row:
    """A component's figures. rates: operations and bytes a millisecond, by round."""
    work = model.work
    least = np.maximum(work.flops / rates[0], work.bytes / rates[1])
    figures = {
        "flops": Figure(unit="GFLOP", samples=(work.flops / 1e9,)),
        "bytes": Figure(unit="MB", samples=(work.bytes / 1e6,)),
        "call": _figure("ms", taken),
        "gflops": _figure("GFLOP/s", work.flops / taken / 1e6),
        "share": _figure("share", least / taken),
    }
    return Row(name=f"{name}, {model.precision}", figures=figures)


def _figure(unit: Unit, samples: Times) -> Figure:
    return Figure(unit=unit, samples=tuple(samples.tolist()))


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


def _bound(model: Path, target: Target, shapes: Mapping[str, Shape], options: Options) -> Binding:
    """A binding of a model whose inputs are noise, or the time step 500, or token 0."""
    binding = open_session(model, target, threads=options.threads).bind(shapes)
    random = np.random.default_rng(0)
    for name, array in binding.inputs.items():
        if name == "timestep":
            array[...] = 500
        elif array.dtype.kind == "f":
            array[...] = random.standard_normal(array.shape)
    return binding


def _in_turns(bindings: Sequence[Binding], options: Options) -> list[Times]:
    """Milliseconds of each binding's runs, (repeats,) float64."""
    taken: list[list[float]] = [[] for _ in bindings]
    for round_ in range(options.warm_up + options.repeats):
        for binding, kept in zip(bindings, taken, strict=True):
            began = time.perf_counter()
            binding.run()
            if round_ >= options.warm_up:
                kept.append((time.perf_counter() - began) * 1e3)
    return [np.array(kept) for kept in taken]
