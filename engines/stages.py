"""Stages: a denoiser's graph cut at block boundaries into graphs of even work, each with only its own weights.

What carries the latent's values crosses a cut, skip connections straight to the stage that reads them. What follows
from the time step, the text and the rest of the conditioning alone is computed by every stage that needs it, so that
stages may be given different texts. Fed each other's results of one call, they compute what the whole graph does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from ..runtime.errors import ArgumentError
from ..runtime.manifest import TensorSpec
from ..runtime.stages import MOST_STAGES, Stage
from ..runtime.tensors import latent_names, spec_of
from .blocks import Boundary, block_of, boundaries, chosen, named, spans
from .formulas import ShapeFormulas, sizes_of
from .graph_files import require_opset, spec
from .inferred import inferred
from .stage_parts import Whole, handed_on, part_graph, part_of, tensors


@dataclass(frozen=True, slots=True)
class Nominal:
    """The call that stages are balanced for: a latent's sides and the text's tokens."""

    height: int = 64
    width: int = 64
    sequence: int = 77


@dataclass(frozen=True, slots=True)
class StageGraph:
    """A stage and its graph, whose weights lie where the whole graph's do."""

    stage: Stage
    model: onnx.ModelProto


def stage_graphs(
    model: onnx.ModelProto,
    count: int | None = None,
    *,
    at: Sequence[str] = (),
    nominal: Nominal = Nominal(),
    where: str = "denoiser",
) -> tuple[StageGraph, ...]:
    """Cut a denoiser into `count` stages of even work, or before the blocks that `at` names.

    Of even multiply-adds at the nominal size; within three hundredths of the most even split, the one with the fewest
    bytes to hand on. Nodes, weights and tensors keep their names, but what crosses a cut is called `stage/…`.
    One with LoRA slots may be given as well; each stage has those of its own projections.

    model: the graph; its weights may lie in files and are not read.

    Raises:
        ArgumentError: the graph is no denoiser of named blocks, has fewer blocks than stages or not those named, or
            the count is not in 2..4.
        BundleError: an opset below 13, or a shape that no formula of the inputs' sizes gives.
    """
    require_opset(model, where)
    inputs = tuple(spec(value, where) for value in model.graph.input)
    latent = _latent(inputs, model.graph, where)
    stages = len(at) + 1 if at else count
    if stages is None or not 2 <= stages <= MOST_STAGES or count not in (None, stages):
        got = f"{count}, cut before {', '.join(at)}" if at else count
        raise ArgumentError(where, "stages to cut a denoiser into", got=got, expected=f"2..{MOST_STAGES}")
    sides = {"height": nominal.height, "width": nominal.width, "sequence": nominal.sequence}
    known = inferred(model, sizes_of(inputs, batch=1, **sides), where)
    formulas = ShapeFormulas(model, inputs, where)
    whole = Whole(model, latent, known, formulas, where)
    # Where a stage begins within its block must not depend on the size it is balanced for.
    candidates = boundaries(model.graph, whole.activations, formulas.known)
    if not candidates:
        raise ArgumentError(
            where,
            "no denoiser whose blocks are told by its nodes' names",
            got=f"{len(model.graph.node)} nodes",
            expected="names such as down_blocks.0.resnets.0/… or transformer_blocks.0/…",
            remedy="Export it from its checkpoint.",
        )
    cuts = named(candidates, at, where) if at else chosen(candidates, whole.multiply_adds, stages, where)
    return _cut(whole, cuts)


def _latent(inputs: Sequence[TensorSpec], graph: onnx.GraphProto, where: str) -> str:
    names = latent_names(inputs)
    if spec_of(inputs, names.sample) is None or spec_of(inputs, "encoder_hidden_states") is None:
        got = ", ".join(value.name for value in (*graph.input, *graph.output))
        expected = f"{names.sample} and encoder_hidden_states among its inputs"
        raise ArgumentError(where, "no denoiser, and nothing else is cut into stages", got=got, expected=expected)
    return names.sample


def _cut(whole: Whole, cuts: Sequence[Boundary]) -> tuple[StageGraph, ...]:
    parts = [part_of(whole, span) for span in spans(whole.graph, cuts)]
    crossing = set[str]().union(*(part.taken for part in parts))
    first = next(block for block in map(block_of, whole.graph.node) if block)
    made = []
    for index, (part, begins) in enumerate(zip(parts, (first, *(cut.block for cut in cuts)), strict=True)):
        graph = part_graph(whole, part, crossing, handed_on(whole, part, parts[index + 1 :]))
        work = sum(whole.multiply_adds[place] for place in part.places)
        stage = Stage(
            index=index,
            count=len(parts),
            begins=begins,
            inputs=tensors(graph.graph.input, whole.where),
            outputs=tensors(graph.graph.output, whole.where),
            share=work / max(sum(whole.multiply_adds), 1),
        )
        made.append(StageGraph(stage, graph))
    return tuple(made)
