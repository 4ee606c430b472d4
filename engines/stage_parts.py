"""What one stage of a cut graph holds: its nodes, what it computes for itself, and where it asks for sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import helper

from ..runtime.errors import BundleError
from ..runtime.manifest import TensorSpec
from ..runtime.stages import CARRIED
from .blocks import of_the_latent
from .fold import TIMESTEP
from .formulas import Formulas, ShapeFormulas
from .graph_files import reads_of, spec
from .inferred import Inferred, multiply_adds, shape_range

# What has the shape of what it reads, so that a size may be asked of that instead.
_KEEPS_SHAPE = frozenset({"Cast", "Identity"})


class Whole:
    """A graph to cut, and what is known of its values.

    activations: those computed of the latent's values. made_at: the place of the node that makes a value.
    multiply_adds: of each node, at the sizes the cut is balanced for.
    """

    def __init__(
        self, model: onnx.ModelProto, latent: str, known: Inferred, formulas: ShapeFormulas, where: str
    ) -> None:
        self.model, self.graph, self.where, self._formulas = model, model.graph, where, formulas
        self.inputs = {value.name: spec(value, where) for value in model.graph.input}
        self.activations = of_the_latent(model.graph, latent)
        self.made_at = {name: place for place, node in enumerate(model.graph.node) for name in node.output if name}
        self.multiply_adds = [multiply_adds(node, known.shapes) for node in model.graph.node]

    def shape(self, name: str) -> Formulas | None:
        """A value's shape in formulas of the inputs' sizes."""
        return self.inputs[name].shape if name in self.inputs else self._formulas.of(name)

    def carried(self, name: str) -> onnx.ValueInfoProto:
        """A value as one stage hands it to another.

        Raises:
            BundleError: its shape is no formula.
        """
        shape = self.shape(name)
        if shape is None:
            what, expected = f"shape of {name!r}, which crosses a cut", "a product of the inputs' sizes"
            raise BundleError(self.where, what, got=shape, expected=expected, remedy="Cut elsewhere.")
        made: onnx.ValueInfoProto = helper.make_tensor_value_info(
            CARRIED + name, self._formulas.known.types[name], shape
        )
        return made


@dataclass(slots=True)
class Part:
    """One stage: the places of its nodes, what it takes of earlier stages, what it is given from outside.

    asked: by the place of a Shape node, what it asks instead of what the whole graph's does, and the axes.
    """

    places: set[int]
    taken: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    asked: dict[int, tuple[str, slice]] = field(default_factory=dict)


def part_of(whole: Whole, span: range) -> Part:
    """The stage of the nodes in `span`: those computed of the latent, and from anywhere what the rest of it needs."""
    nodes = whole.graph.node
    part = Part({place for place in span if not whole.activations.isdisjoint(nodes[place].output)})
    waiting, sizes = sorted(part.places), []
    while waiting:
        place = waiting.pop()
        asks = nodes[place].op_type == "Shape"
        for name in reads_of(nodes[place]):
            made_at = whole.made_at.get(name)
            outside = name in whole.inputs or (name in whole.activations and made_at not in span)
            if outside and asks:
                sizes.append(place)
            elif outside:
                (part.given if name in whole.inputs else part.taken).add(name)
            elif made_at is not None and made_at not in part.places:
                part.places.add(made_at)
                waiting.append(made_at)
    for place in sorted(sizes):
        _ask(whole, part, place)
    return part


def _ask(whole: Whole, part: Part, place: int) -> None:
    """Settle of what a stage asks a size that the whole graph asks of something the stage may not have."""
    node = whole.graph.node[place]
    name = str(node.input[0])
    if name in part.taken | part.given:
        return
    shape = whole.shape(name)
    if shape is not None:
        axes = shape_range(node, len(shape))
        found = _alike(whole, part, shape[axes])
        if found is not None:
            part.asked[place] = found
            return
    while name not in whole.inputs and whole.graph.node[whole.made_at[name]].op_type in _KEEPS_SHAPE:
        name = str(whole.graph.node[whole.made_at[name]].input[0])
    (part.given if name in whole.inputs else part.taken).add(name)
    if shape is not None:
        part.asked[place] = name, shape_range(node, len(shape))


def _alike(whole: Whole, part: Part, wanted: Formulas) -> tuple[str, slice] | None:
    """Something the stage has whose shape holds these sizes side by side."""
    # A time step may have one row for all of the batch, whatever its axis is called.
    for name in (*sorted(part.taken, key=whole.made_at.__getitem__), *sorted(part.given - {TIMESTEP})):
        shape = whole.shape(name) or ()
        for begin in range(len(shape) - len(wanted) + 1):
            if shape[begin : begin + len(wanted)] == wanted:
                return name, slice(begin, begin + len(wanted))
    return None


def part_graph(whole: Whole, part: Part, crossing: Collection[str], handed_on: Iterable[str]) -> onnx.ModelProto:
    """The stage as a graph of its own.

    crossing: all values that cross a cut, and are called by another name therefore. handed_on: those of this stage.

    Raises:
        BundleError: the shape of one is no formula.
    """
    made = onnx.ModelProto()
    made.ir_version = whole.model.ir_version
    made.opset_import.extend(whole.model.opset_import)
    made.functions.extend(whole.model.functions)
    made.graph.name = whole.graph.name
    for place in sorted(part.places):
        node = made.graph.node.add()
        node.CopyFrom(whole.graph.node[place])
        if place in part.asked:
            _ask_of(node, *part.asked[place])
        _rename(node, crossing)
    needed = set().union(*map(reads_of, made.graph.node))
    made.graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in needed)
    made.graph.input.extend(map(whole.carried, sorted(part.taken, key=whole.made_at.__getitem__)))
    made.graph.input.extend(value for value in whole.graph.input if value.name in part.given)
    made.graph.output.extend(map(whole.carried, handed_on))
    made.graph.output.extend(value for value in whole.graph.output if whole.made_at.get(value.name) in part.places)
    return made


def _ask_of(node: onnx.NodeProto, name: str, axes: slice) -> None:
    node.input[0] = name
    del node.attribute[:]
    node.attribute.extend([helper.make_attribute("start", axes.start), helper.make_attribute("end", axes.stop)])


def _rename(node: onnx.NodeProto, names: Collection[str]) -> None:
    """Call the values of these names as they are called between stages, inside branches and loops too."""
    for values in (node.input, node.output):
        for index, name in enumerate(values):
            if name in names:
                values[index] = CARRIED + name
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in body.node:
                _rename(inner, names)


def handed_on(whole: Whole, part: Part, later: Sequence[Part]) -> list[str]:
    """What a stage makes that later ones take, in the order it is made."""
    taken = set[str]().union(*(other.taken for other in later))
    return sorted((name for name in taken if whole.made_at[name] in part.places), key=whole.made_at.__getitem__)


def tensors(values: Iterable[onnx.ValueInfoProto], where: str) -> tuple[TensorSpec, ...]:
    """A graph's inputs or outputs as a manifest has them."""
    return tuple(spec(value, where) for value in values)
