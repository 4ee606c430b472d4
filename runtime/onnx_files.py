"""What an ONNX model says of itself: the files it refers to, the tensors it takes and gives, its projections, and where
its weights lie.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import BundleError
from .manifest import TensorSpec
from .onnx_walk import MalformedError, Projection, Stored, Walk

T = TypeVar("T")


def external_files(model: Path) -> frozenset[str]:
    """The external data files that tensors of an ONNX model name, as the model spells them.

    Raises:
        BundleError: the file is not a well-formed protobuf message with a graph, or cannot be read.
    """
    return _read(model, lambda walk: frozenset(walk.locations()))


def graph_tensors(model: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A graph's inputs and outputs with their symbolic shapes; initializers that are listed as inputs are left out.

    A dimension without size or symbol is given a symbol of its own.

    Raises:
        BundleError: as `external_files` does; or a tensor's type is not one of the manifest's.
    """
    return _read(model, lambda walk: walk.tensors())


def node_count(model: Path) -> int:
    """How many nodes a model's graph has.

    Raises:
        BundleError: as `external_files` does.
    """
    return _read(model, lambda walk: walk.nodes())


def projections(model: Path) -> dict[str, tuple[int, ...]]:
    """The weights' shapes of a graph's projections by module, (out, in) or (out, in, height, width), as PyTorch's are.

    Those are MatMul, Gemm and two-dimensional convolutions of one group whose weight is stored; see `lora_slots`.

    Raises:
        BundleError: as `external_files` does.
    """
    return {one.module: one.shape for one in _read(model, lambda walk: tuple(walk.projections()))}


def own_projections(model: Path) -> dict[str, Projection]:
    """A graph's projections by module, where each is the only one to read its weight.

    Raises:
        BundleError: as `external_files` does; or two are of one name, or something else reads a projection's weight.
    """
    found, reads = _read(model, lambda walk: (tuple(walk.projections()), Counter(walk.reads())))
    named = Counter(one.module for one in found)
    twice = [one.module for one in found if named[one.module] > 1 or reads[one.weight] > 1]
    if twice:
        expected = "projections with names and weights of their own"
        remedy = "Other weights cannot be given to it; build its engines with --lora-slots."
        raise BundleError(str(model), "projections that share", got=twice[:5], expected=expected, remedy=remedy)
    return {one.module: one for one in found}


def stored_weights(model: Path) -> dict[str, Stored]:
    """Where the weights of a graph lie by name; those that are not stored as plain bytes are left out.

    Raises:
        BundleError: as `external_files` does; or a weight has more or fewer bytes than its shape says.
    """
    return _read(model, lambda walk: dict(walk.stored()))


def _read(model: Path, read: Callable[[Walk], T]) -> T:
    try:
        with model.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(Walk(data))
    except (MalformedError, OSError, ValueError) as error:
        raise BundleError(
            str(model), f"not an ONNX model ({error})", remedy="Copy the bundle again, or export it again."
        ) from error
