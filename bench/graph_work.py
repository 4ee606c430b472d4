"""What a call of a model cannot do without: floating-point operations, and bytes that are read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.runtime.backends.base import Shape
from tandemrt.runtime.backends.buffers import symbol_sizes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.shapes import evaluated

from .sizes import stored_bytes

_LARGEST_KEPT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations, two a multiply-add; bytes of weights as they are stored, inputs and outputs, once."""

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


def work_of(bundle: Bundle, name: str, shapes: Mapping[str, Shape]) -> Work:
    """The work of a call of component `name` whose inputs have these shapes.

    Raises:
        BundleError: the shapes of the graph's values cannot be told.
    """
    from tandemrt.engines.calls import call_of  # noqa: PLC0415 (onnx)
    from tandemrt.engines.graph_files import read_graph  # noqa: PLC0415

    component, graph = bundle.component(name), read_graph(bundle.model_path(name))
    for tensor in graph.graph.initializer:  # weights that a graph has inside would be copied with it
        if tensor.ByteSize() > _LARGEST_KEPT_BYTES:
            tensor.ClearField("raw_data")
    call = call_of(graph, shapes, name)
    if call is None:
        raise BundleError(name, "shapes of its values cannot be told, nor its work counted", remedy="Leave it out.")
    sizes, moved = symbol_sizes(name, component.inputs, shapes), 0
    for spec in (*component.inputs, *component.outputs):
        moved += prod(evaluated(spec.shape, sizes) or (0,)) * np.dtype(spec.dtype).itemsize
    return Work(2 * call.multiply_adds, stored_bytes(bundle, name) + moved)
