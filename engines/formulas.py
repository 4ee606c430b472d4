"""Formulas of a graph's symbolic dimensions for the shapes of values inside it, found by trying sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isqrt

import onnx

from ..runtime.manifest import TensorSpec
from ..runtime.shapes import evaluated
from ..runtime.tensors import latent_names
from .inferred import Inferred, inferred

# Sides of a latent that halve four times.
_SIDE, _BATCH, _TOKENS = 16, 2, 7
Formulas = tuple[int | str, ...]


def sizes_of(inputs: Sequence[TensorSpec], *, batch: int, height: int, width: int, sequence: int) -> dict[str, int]:
    """Sizes for the symbols of a denoiser's inputs: latents (batch, channels, height, width), texts of `sequence`.

    A time step has a row for each of the batch. What other inputs call their axes follows from these, or is `batch`.
    """
    axes = {
        latent_names(inputs).sample: (batch, None, height, width),
        "encoder_hidden_states": (batch, sequence),
    }
    sizes: dict[str, int] = {}
    for one in sorted(inputs, key=lambda one: one.name not in axes):
        for stated, size in zip(one.shape, (*axes.get(one.name, ()), *[batch] * len(one.shape)), strict=False):
            if isinstance(stated, str) and size is not None and evaluated([stated], sizes) is None:
                sizes[stated] = size
    return sizes


class ShapeFormulas:
    """The shapes of a denoiser's values as formulas such as `(height // 2)*(width // 2)`.

    They hold for sides that are multiples of what the model halves them to, which engines take no others than.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Sequence[TensorSpec], where: str) -> None:
        """Raises BundleError where an input's shape cannot be told."""
        least = {"batch": _BATCH, "height": _SIDE, "width": _SIDE, "sequence": _TOKENS}
        names = latent_names(inputs)
        self._symbols = _symbols(inputs, names.sample)

        def at(**sizes: int) -> tuple[dict[str, int], Inferred]:
            given = sizes_of(inputs, **{**least, **sizes})
            return given, inferred(model, given, where)

        self._sizes, self._least = at()
        self._doubled = {axis: at(**{axis: 2 * least[axis]})[1] for axis in self._symbols}
        self._check = at(batch=3, height=3 * _SIDE, width=2 * _SIDE, sequence=11)
        self.types: Mapping[str, int] = self._least.types

    def of(self, name: str) -> Formulas | None:
        """A value's shape; None where it is no product of the inputs' sizes."""
        shapes = [one.shapes.get(name) for one in (self._least, *self._doubled.values(), self._check[1])]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes) or len({len(shape) for shape in known}) > 1:
            return None
        formulas = [self._formula(sizes[0], dict(zip(self._doubled, sizes[1:-1], strict=True)))
                    for sizes in zip(*known, strict=True)]  # fmt: skip
        found = tuple(formula for formula in formulas if formula is not None)
        return found if evaluated(found, self._check[0]) == known[-1] else None

    def _formula(self, size: int, doubled: Mapping[str, int]) -> int | str | None:
        """The product of the symbols with which a size doubles, times what is left."""
        symbols = [self._symbols[axis] for axis, found in doubled.items() if found != size]
        if any(found not in (size, 2 * size) for found in doubled.values()):
            return None
        rest = Fraction(size)
        for symbol in symbols:
            rest /= self._sizes[symbol]
        if not symbols:
            return size
        divisor, root = rest.denominator, isqrt(rest.denominator)
        if divisor > 1 and len(symbols) == 2 and root * root == divisor:
            product = "*".join(f"({symbol} // {root})" for symbol in symbols)
            return product if rest.numerator == 1 else f"{rest.numerator}*{product}"
        product = "*".join([*([str(rest.numerator)] if rest.numerator > 1 else []), *symbols])
        return product if divisor == 1 else f"{product} // {divisor}"


def _symbols(inputs: Sequence[TensorSpec], latent: str) -> dict[str, str]:
    """What the graph calls the axes that have no fixed size."""
    stated: dict[str, int | str] = {}
    for one in inputs:
        if one.name == latent:
            stated |= dict(zip(("batch", "height", "width"), (one.shape[0], *one.shape[2:]), strict=True))
        elif one.name == "encoder_hidden_states":
            stated["sequence"] = one.shape[1]
    return {axis: symbol for axis, symbol in stated.items() if isinstance(symbol, str)}
