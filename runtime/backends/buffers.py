"""Host buffers of a binding: their shapes checked against a model's, and allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import BUILD, ExecutionError, TargetError
from ..manifest import TensorSpec
from ..shapes import evaluated
from .base import Array, Shape

# Of an engine that is as it was built: the builder would take it from the cache.
REMOVE_AND_BUILD = f"Remove its folder, and build it again with {BUILD}."

Arrays = Mapping[str, Array]


def allocated(
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    input_shapes: Mapping[str, Shape],
    measured: Callable[[Arrays], Sequence[Shape]],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Zeros for the inputs and outputs of model `name`, of the stated types.

    measured: the outputs' shapes as a run on given inputs shows them, asked where the stated symbols do not tell.

    Raises:
        ExecutionError: an input is missing or unknown, a shape does not fit the model, or there is too little memory.
    """
    sizes = symbol_sizes(name, inputs, input_shapes)
    try:
        given = {spec.name: np.zeros(input_shapes[spec.name], spec.dtype) for spec in inputs}
        shapes = [evaluated(spec.shape, sizes) for spec in outputs]
        known = [shape for shape in shapes if shape is not None]
        output_shapes = known if len(known) == len(shapes) else measured(given)
        made = {spec.name: np.zeros(shape, spec.dtype) for spec, shape in zip(outputs, output_shapes, strict=True)}
    except (MemoryError, ValueError) as error:
        raise ExecutionError(
            name,
            f"buffers cannot be allocated ({error})",
            got=dict(input_shapes),
            remedy="Ask for a smaller size or batch.",
        ) from error
    return given, made


def symbol_sizes(name: str, inputs: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The size of every symbolic dimension of the inputs of model `name`.

    Raises:
        ExecutionError: an input is missing or unknown, or a shape does not fit the model.
    """
    names = [spec.name for spec in inputs]
    if set(names) != set(shapes):
        raise ExecutionError(name, "inputs", got=sorted(shapes), expected=", ".join(names))
    sizes: dict[str, int] = {}
    for spec in inputs:
        shape = shapes[spec.name]
        fits = len(shape) == len(spec.shape) and all(
            size >= 1 and size == (sizes.setdefault(stated, size) if isinstance(stated, str) else stated)
            for size, stated in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            expected = "(" + ", ".join(map(str, spec.shape)) + ")"
            raise ExecutionError(name, f"shape of input {spec.name!r}", got=shape, expected=expected)
    return sizes


def require_numpy_types(name: str, specs: Sequence[TensorSpec]) -> None:
    """Raise TargetError when a tensor's type is one numpy has not."""
    for spec in specs:
        if spec.dtype == "bfloat16":
            raise TargetError(name, f"type of {spec.name!r}", got=spec.dtype, expected="a type numpy has")


def one_line(error: BaseException) -> str:
    """What a library said, on one line of bounded length."""
    return " ".join(str(error).split())[:500]


def not_loaded(backend: str, file: Path, engine_of: str | None, error: BaseException) -> ExecutionError:
    """The error for a graph, or for the engine of a component, that a backend does not load."""
    if engine_of is None:
        remedy = f"Check it with `tandemrt verify`, or try a newer {backend.lower().replace(' ', '')}."
        return ExecutionError(str(file), f"{backend} cannot load the model ({one_line(error)})", remedy=remedy)
    what = f"{backend} cannot load the engine in {file.parent} ({one_line(error)})"
    return ExecutionError(engine_of, what, remedy=REMOVE_AND_BUILD)
