"""What a call of a model cannot do without: floating-point operations, and bytes that are read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.runtime.backends.base import Shape
from tandemrt.runtime.backends.buffers import symbol_sizes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.shapes import evaluated

if TYPE_CHECKING:
    import onnx

# What is said of `Work.bytes`, and of calls that take less than they are said to.
BYTES_NOTE = "weights as they are computed with, without tables that rows are taken of, inputs and outputs"
ABOVE_NOTE = (
    "Above 100% are convolutions that the backend does in fewer operations, weights that the processor's caches keep "
    "from call to call, or a limit that was measured too low, as on a machine that is not at rest."
)
_LARGEST_KEPT_BYTES = 4096
# Of a number in a precision; in eight bits what is not quantized may be in 16.
_BITS = {"fp32": 32}
_OTHER_BITS = 16


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations, two a multiply-add; bytes of weights, inputs and outputs that a call has to move."""

    flops: int
    bytes: int


def call_shapes(bundle: Bundle, name: str, profile: str) -> dict[str, Shape]:
    """The shapes of a component's inputs in the call that a profile is tuned for; see `parse_profile`.

    Raises:
        ArgumentError: the profile is none, or outside the model.
        BundleError: an input's shape does not follow from it.
    """
    ranges = input_ranges(name, bundle.component(name), bundle.manifest, parse_profile(profile))
    return {one: sizes.opt for one, sizes in ranges.items()}


def work_of(bundle: Bundle, name: str, shapes: Mapping[str, Shape], precision: str) -> Work:
    """The work of a call of component `name` whose inputs have these shapes, where it computes in a precision.

    Raises:
        BundleError: the shapes of the graph's values cannot be told.
    """
    from tandemrt.engines.calls import call_of  # noqa: PLC0415 (onnx)
    from tandemrt.engines.graph_files import read_graph  # noqa: PLC0415

    component, graph = bundle.component(name), read_graph(bundle.model_path(name))
    weights = weight_bytes(graph.graph, precision)
    for tensor in graph.graph.initializer:  # weights that a graph has inside would be copied with it
        if tensor.ByteSize() > _LARGEST_KEPT_BYTES:
            tensor.ClearField("raw_data")
    call = call_of(graph, shapes, name)
    if call is None:
        raise BundleError(name, "shapes of its values cannot be told, nor its work counted", remedy="Leave it out.")
    sizes, moved = symbol_sizes(name, component.inputs, shapes), 0
    for spec in (*component.inputs, *component.outputs):
        moved += prod(evaluated(spec.shape, sizes) or (0,)) * np.dtype(spec.dtype).itemsize
    return Work(2 * call.multiply_adds, weights + moved)


def weight_bytes(graph: onnx.GraphProto, precision: str) -> int:
    """What a call reads of a graph's weights at least: each once, in as few bits as it is stored in or computed with.

    Tables that Gather takes rows of do not count: how many rows that are is the call's.
    """
    from onnx import TensorProto, helper  # noqa: PLC0415

    from tandemrt.engines.graph_files import reads_of  # noqa: PLC0415

    halves, computed = {TensorProto.INT4, TensorProto.UINT4}, _BITS.get(precision, _OTHER_BITS)
    read: set[str] = set()
    for node in graph.node:
        read |= reads_of(node) - ({node.input[0]} if node.op_type == "Gather" else set())
    bits = 0
    for tensor in graph.initializer:
        if tensor.name in read:
            item = 4 if tensor.data_type in halves else 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            bits += prod(tensor.dims) * min(item, computed)
    return bits // 8
