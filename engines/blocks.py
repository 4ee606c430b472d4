"""Blocks of a denoiser told by its nodes' names, and the boundaries between them that split its work evenly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from math import prod
from pathlib import Path

import onnx
from onnx import helper

from ..runtime.errors import ArgumentError, BundleError
from .graph_files import read_graph, reads_of
from .inferred import DENSE, Inferred, Shape, inferred_at, multiply_adds

# diffusers' modules, as exporters write them: down_blocks.0.attentions.1/Add or /down_blocks.0/attentions.1/Add.
_UNET = r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block)\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+"
_BLOCK = re.compile(rf"(?:(?:unet|transformer)\.)?({_UNET}(?:\.transformer_blocks\.\d+)?|transformer_blocks\.\d+)\.")
_FIRST_INSIDE = re.compile(r"(.+)\.transformer_blocks\.0")
# Of other models, and of what a denoiser has outside its blocks: encoder.layers.3, decoder.up_blocks.1, conv_in.
_PART = re.compile(r"(?:[A-Za-z_]\w*\.)+?\d+(?=\.)")
_ELSEWHERE = "elsewhere"
# How much more work than in the most even split a stage may have for the sake of fewer bytes to hand on.
_TOLERANCE = 1.03


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a stage may begin: the block's name, the place of its first node, and the bytes that cross at it."""

    block: str
    position: int
    crossing_bytes: int


def block_of(node: onnx.NodeProto) -> str | None:
    """The block a node belongs to, such as `down_blocks.0.attentions.1`; None outside all blocks.

    A UNet's attentions hold several transformer blocks in larger models, which are blocks of their own from the second
    on.
    """
    found = _BLOCK.match(f"{node.name.replace('/', '.').strip('.')}.")
    if found is None:
        return None
    first = _FIRST_INSIDE.fullmatch(found[1])
    return first[1] if first else found[1]


def work_by_block(graph: Path, shapes: Mapping[str, Shape], where: str) -> dict[str, int]:
    """The multiply-adds of a call by block, in the graph's order, where its inputs have these shapes.

    Raises:
        BundleError: the file cannot be read, an input's shape is not given, or that of a factor cannot be told.
    """
    model = read_graph(graph)
    known = inferred_at(model, shapes, where).shapes
    work: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in DENSE:
            untold = next((name for name in (*node.input[:2], node.output[0]) if name not in known), None)
            if untold is not None:
                raise BundleError(where, f"the shape of {untold!r}, of {node.op_type} {node.name!r}, cannot be told")
            work[_part_of(node)] += multiply_adds(node, known)
    return dict(work)


def _part_of(node: onnx.NodeProto) -> str:
    """The block a node belongs to or, outside of all a denoiser has, the module."""
    block = block_of(node)
    if block is not None:
        return block
    name = node.name.replace("/", ".").strip(".")
    numbered = _PART.match(name)
    return numbered[0] if numbered else name.rpartition(".")[0] or _ELSEWHERE


def of_the_latent(graph: onnx.GraphProto, latent: str) -> set[str]:
    """The values that are computed of a latent's values; its sizes alone do not count."""
    found = {latent}
    for node in graph.node:
        if node.op_type != "Shape" and not found.isdisjoint(reads_of(node)):
            found.update(node.output)
    return found - {""}


def boundaries(graph: onnx.GraphProto, activations: set[str], known: Inferred) -> list[Boundary]:
    """Where stages may begin: before each block but the first, where the fewest bytes cross.

    Nodes outside all blocks, such as the concatenation of a skip connection, go to the stage that has less to hand on
    for it.
    """
    crossing = _crossing_bytes(graph, activations, known)
    found, seen, last = [], set[str](), None
    for position, node in enumerate(graph.node):
        block = block_of(node)
        if block is None:
            continue
        if block not in seen and last is not None:
            place = min(range(last + 1, position + 1), key=crossing.__getitem__)
            found.append(Boundary(block, place, crossing[place]))
        seen.add(block)
        last = position
    return found


def _crossing_bytes(graph: onnx.GraphProto, activations: set[str], known: Inferred) -> list[int]:
    """For each place between nodes, the bytes made before it and read behind it."""
    last_read = {name: place for place, node in enumerate(graph.node) if node.op_type != "Shape"
                 for name in reads_of(node)}  # fmt: skip
    changes = [0] * (len(graph.node) + 2)
    for place, node in enumerate(graph.node):
        for name in activations.intersection(node.output).intersection(known.shapes):
            until = last_read.get(name, place)
            size = prod(known.shapes[name]) * helper.tensor_dtype_to_np_dtype(known.types[name]).itemsize
            changes[place + 1] += size
            changes[until + 1] -= size
    return list(accumulate(changes))


def chosen(candidates: Sequence[Boundary], work: Sequence[int], count: int, where: str) -> tuple[Boundary, ...]:
    """The boundaries of `count` stages of even work: of those as good as the best, the ones with least to hand on.

    work: of each of the graph's nodes.

    Raises:
        ArgumentError: there are fewer blocks than stages.
    """
    if count > len(candidates) + 1:
        raise ArgumentError(where, "stages to cut a denoiser into", got=count,
                            expected=f"at most {len(candidates) + 1}, as many as it has blocks")  # fmt: skip
    before = [0, *accumulate(work)]
    splits = [(_most(before, split), sum(one.crossing_bytes for one in split), split)
              for split in combinations(candidates, count - 1)]  # fmt: skip
    limit = min(most for most, _, _ in splits) * _TOLERANCE
    return min((split for split in splits if split[0] <= limit), key=lambda split: split[1])[2]


def _most(before: Sequence[int], split: Sequence[Boundary]) -> int:
    """The work of the largest stage."""
    marks = [0, *(before[one.position] for one in split), before[-1]]
    return max(end - begin for begin, end in pairwise(marks))


def named(candidates: Sequence[Boundary], at: Sequence[str], where: str) -> tuple[Boundary, ...]:
    """The boundaries before the blocks of these names.

    Raises:
        ArgumentError: the graph has no such block, it is the first, or they are not in the graph's order.
    """
    by_block = {one.block: one for one in candidates}
    strange = next((block for block in at if block not in by_block), None)
    if strange is not None:
        raise ArgumentError(
            where,
            "a cut before a block that the graph does not have, or begins with",
            got=strange,
            expected=f"one of {', '.join(by_block)}",
        )
    found = tuple(by_block[block] for block in at)
    if any(one.position >= two.position for one, two in pairwise(found)):
        raise ArgumentError(where, "order of the cuts", got=list(at), expected="that of the graph, each block once")
    return found


def spans(graph: onnx.GraphProto, cuts: Sequence[Boundary]) -> Iterator[range]:
    """The places of each stage's nodes."""
    marks = [0, *(one.position for one in cuts), len(graph.node)]
    yield from (range(begin, end) for begin, end in pairwise(marks))
