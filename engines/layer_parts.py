"""The smallest part of a graph that still computes a value wrongly, cut out to be attached to a bug report."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model

from ..runtime.backends.base import Array
from ..runtime.engine_files import Shape
from ..runtime.errors import ArgumentError
from ..runtime.manifest import Frozen
from .graph_files import reads_of
from .layer_graphs import Value, giving

_INSIDE_UP_TO_BYTES = 1 << 30  # protobuf messages end at 2 GiB


class Part(Frozen, frozen=True, kw_only=True):
    """A part of a graph that was written.

    graph: its file. inputs: a file of what it is given, as Polygraphy reads it. nodes: how many it has.
    relative_error: how far the target is from the reference when it is given the reference's values; see `Difference`.
    """

    graph: str
    inputs: str
    nodes: int
    relative_error: float | None


def boundaries(model: onnx.ModelProto, tensor: str, readable: Mapping[str, Value]) -> Iterator[frozenset[str]]:
    """The values that growing parts of a graph are to be given so that they make `tensor`: 1, 2, 4, … nodes away.

    The last set is empty: that part reaches up to the graph's own inputs.

    readable: values that can be given, by name. What is no such value, shapes and masks, is computed in the part.
    """
    makers = {result: node for node in model.graph.node for result in node.output}
    # A value that nothing has to be known for is a constant, which stays in the part.
    given = {name for name in readable.keys() & makers.keys() if reads_of(makers[name])}
    steps = 1
    while boundary := _boundary(makers, tensor, given, steps):
        yield boundary
        steps *= 2
    yield frozenset()


def _boundary(makers: Mapping[str, onnx.NodeProto], tensor: str, given: set[str], steps: int) -> frozenset[str]:
    boundary, seen = set[str](), {tensor}
    pending = deque([(tensor, steps)])
    while pending:
        name, left = pending.popleft()
        for read in reads_of(makers[name]) - seen if name in makers else ():
            seen.add(read)
            if read not in given:
                pending.append((read, left))
            elif left > 1:
                pending.append((read, left - 1))
            else:
                boundary.add(read)
    return frozenset(boundary)


def part_making(
    model: onnx.ModelProto, value: Value, boundary: Mapping[str, Value], shapes: Mapping[str, Shape]
) -> onnx.ModelProto:
    """A copy of a graph that makes `value` alone and is given the values of `boundary`, bfloat16 ones as float32.

    shapes: of all of these, by name.
    """
    copied: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    graph = copied.graph
    in_bfloat16 = {name for name, one in boundary.items() if one.elem_type == TensorProto.BFLOAT16}
    for node in graph.node:
        node.input[:] = [f"{name}_given" if name in in_bfloat16 else name for name in node.input]
        node.output[:] = [f"{name}_before" if name in boundary else name for name in node.output]
    for name in sorted(in_bfloat16):
        cast = helper.make_node("Cast", [name], [f"{name}_given"], name=f"{name}/Cast", to=TensorProto.BFLOAT16)
        graph.node.insert(0, cast)
    kept = [one for one in graph.value_info if one.name not in boundary]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for name, one in sorted(boundary.items()):
        elem_type = TensorProto.FLOAT if name in in_bfloat16 else one.elem_type
        graph.input.append(helper.make_tensor_value_info(name, elem_type, shapes[name]))
    part = giving(copied, [value], shapes)
    for taken in part.graph.input:
        if taken.name in shapes:  # the graph's own inputs have symbols
            typed = helper.make_tensor_value_info(taken.name, taken.type.tensor_type.elem_type, shapes[taken.name])
            taken.CopyFrom(typed)
    return part


def check_part_files(path: Path) -> None:
    """Raise ArgumentError where a part cannot be written to `path`."""
    if path.suffix != ".onnx":
        raise ArgumentError("--extract", "name of the file", got=path.name, expected="one that ends in .onnx")
    taken = next((one for one in (path, _inputs_path(path)) if one.exists()), None)
    if taken is not None:
        raise ArgumentError("--extract", "already there", got=str(taken), remedy="Give another name, or remove it.")
    if not path.parent.is_dir():
        raise ArgumentError("--extract", "no such folder", got=str(path.parent))


def write_part(part: onnx.ModelProto, weights_from: Path, feeds: Mapping[str, Array], path: Path) -> Path:
    """Write a part with its weights in it, where they are not too large, and what it is given beside it.

    Returns the path of the latter, which `polygraphy run --load-inputs` reads.
    """
    from polygraphy.json import save_json  # noqa: PLC0415 (of the extra `engines`)

    copied: onnx.ModelProto = onnx.ModelProto.FromString(part.SerializeToString())
    load_external_data_for_model(copied, str(weights_from))
    beside: dict[str, Any] = {}
    if copied.ByteSize() > _INSIDE_UP_TO_BYTES:
        beside = {"save_as_external_data": True, "location": f"{path.name}_data"}
    onnx.save_model(copied, path, **beside)
    inputs = _inputs_path(path)
    save_json([dict(feeds)], str(inputs))
    return inputs


def _inputs_path(path: Path) -> Path:
    return path.with_suffix(".inputs.json")
