"""Weights under other names than their file has, converted one by one as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .weights import Weights

if TYPE_CHECKING:
    import torch

Change = Literal["none", "transposed", "flattened", "halves swapped"]


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: the tensor `name` of a file, of which it is the block of rows `block` of `blocks`.

    change: what is done to it then. `flattened` takes the last sides of a 1x1 convolution away, `halves swapped`
    exchanges the upper and the lower half of its rows.
    """

    name: str
    change: Change = "none"
    block: int = 0
    blocks: int = 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor stored in shape `stored` has here."""
        if self.change == "transposed":
            return stored[::-1]
        if self.change == "flattened" and all(length == 1 for length in stored[2:]):
            return stored[:2]
        # What does not divide keeps its shape, in which no architecture has a place for it.
        divides = self.blocks > 1 and len(stored) > 0 and stored[0] % self.blocks == 0
        return (stored[0] // self.blocks, *stored[1:]) if divides else stored

    def tensor(self, stored: torch.Tensor) -> torch.Tensor:
        """The tensor that `stored` is here."""
        import torch  # noqa: PLC0415 — names and shapes are known without it

        if self.change == "transposed":
            return stored.T.contiguous()
        if self.change == "halves swapped":
            return torch.cat(stored.chunk(2)[::-1])
        shape = self.shape(tuple(stored.shape))
        if self.blocks > 1 and shape != tuple(stored.shape):
            # A copy: the rest of the stored tensor would stay in memory behind a view.
            return stored.chunk(self.blocks)[self.block].clone()
        return stored.reshape(shape)


@dataclass(frozen=True)
class Remapped:
    """Some of a file's tensors under the names of `origins`; see `Weights`.

    identities: the sizes of identity matrices that the file leaves out.
    """

    base: Weights
    origins: Mapping[str, Origin]
    identities: Mapping[str, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.base.files

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        found = {name: origin.shape(self.base.shapes[origin.name]) for name, origin in self.origins.items()}
        return {**found, **{name: (size, size) for name, size in self.identities.items()}}

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in; see `Weights.load`."""
        import torch  # noqa: PLC0415

        if name in self.identities:
            return torch.eye(self.identities[name])
        origin = self.origins[name]
        return origin.tensor(self.base.load(origin.name))
