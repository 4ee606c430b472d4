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

# Sides of a latent that halve four times; what each axis grows by, no two alike, to tell what a size grows with; and
# sizes that are another mixture, to prove a formula with.
_LEAST = {"batch": 1, "height": 16, "width": 16, "sequence": 11}
_FACTORS = {"batch": 2, "height": 3, "width": 5, "sequence": 7}
_CHECKED = {"batch": 5, "height": 4, "width": 3, "sequence": 2}
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
    known: types and shapes at the least sizes.
    """

    def __init__(self, model: onnx.ModelProto, inputs: Sequence[TensorSpec], where: str) -> None:
        """Raises BundleError where an input's shape cannot be told."""

        def at(factors: Mapping[str, int]) -> tuple[dict[str, int], Inferred]:
            sizes = sizes_of(inputs, **{axis: least * factors[axis] for axis, least in _LEAST.items()})
            return sizes, inferred(model, sizes, where)

        self._sizes, self.known = at(dict.fromkeys(_LEAST, 1))
        self._grown = at(_FACTORS)[1]
        self._check = at(_CHECKED)
        self._symbols = _symbols(inputs, latent_names(inputs).sample)

    def of(self, name: str) -> Formulas | None:
        """A value's shape; None where it is no product of the inputs' sizes."""
        shapes = [one.shapes.get(name) for one in (self.known, self._grown, self._check[1])]
        least, grown, check = shapes
        if least is None or grown is None or check is None or len(least) != len(grown):
            return None
        formulas = tuple(self._formula(*sizes) for sizes in zip(least, grown, strict=True))
        return formulas if evaluated(formulas, self._check[0]) == check else None

    def _formula(self, size: int, grown: int) -> int | str:
        """The product of the symbols whose factors a size has grown by, times what is left."""
        symbols = [symbol for axis, symbol in self._symbols.items() if size and grown // size % _FACTORS[axis] == 0]
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
