"""Where a generation stands between its rows, on the host or where the backend runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .backends.base import Binding, Handed, Handing
from .step_row import NEXT_STATE, STATE
from .table import Table
from .transfers import read, write

Float32 = npt.NDArray[np.float32]


class State:
    """Where a generation stands: before row `row`, with `arrays` (1+H, B, C, h, w) float32 holding (x, h1 … hH).

    Holding the history, a state can be carried on by another model, or elsewhere, to the same numbers.

    held: the binding of a step or update engine whose `next_state` is it, while it lies where the backend runs.
    scaled: whether that binding's `latent_sample` is of it, what a decoder is to be given.
    """

    __slots__ = ("_arrays", "held", "row", "scaled")

    def __init__(self, arrays: Float32, row: int = 0) -> None:
        self._arrays, self.row = arrays, row
        self.held: Handing | None = None
        self.scaled = False

    @classmethod
    def begin(cls, table: Table, latents: Float32) -> State:
        """The state before the first row of a table, from the latents x there, (B, C, h, w) float32."""
        arrays = np.zeros((1 + table.history, *latents.shape), np.float32)
        arrays[0] = latents
        return cls(arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """The latent's, (B, C, h, w)."""
        return self._arrays.shape[1:]

    @property
    def entries(self) -> int:
        """1+H."""
        return len(self._arrays)

    @property
    def arrays(self) -> Float32:
        """All of it, to be read and written: from now on it lies on the host."""
        self.settle()
        return self._arrays

    def settle(self) -> None:
        """Lie on the host."""
        if self.held is not None:
            self._arrays[...], self.held = self.held.read(NEXT_STATE)[: self.entries], None

    @property
    def latents(self) -> Float32:
        """The latent x, (B, C, h, w) float32, to be read; where the state lies elsewhere it stays there."""
        latents: Float32 = self._arrays[0]
        if self.held is not None:
            latents[...] = self.held.read(NEXT_STATE, 0)
        return latents

    def give(self, binding: Binding) -> None:
        """Write it to a step or update engine's input, from where it lies."""
        if isinstance(binding, Handing) and self.held is not None:
            binding.take([Handed(STATE, self.held, NEXT_STATE)])
            return
        binding.inputs[STATE][: self.entries] = self.arrays
        write(binding, STATE)

    def become(self, binding: Binding) -> None:
        """Be what a step or update engine has made of it, which stays where it lies."""
        if isinstance(binding, Handing):
            self.held, self.scaled = binding, True
        else:
            self.arrays[...] = binding.outputs[NEXT_STATE][: self.entries]

    def stay(self, binding: Binding) -> None:
        """Be what a step or update engine was given, on the host, where its run has written over it."""
        if self.held is binding:
            self._arrays[...], self.held = read(binding, STATE)[: self.entries], None

    def change(self, change: Callable[[Float32], None]) -> None:
        """Let the latent x be changed in place, on the host; the history stays where it lies."""
        if self.held is None:
            change(self._arrays[0])
            return
        change(self.held.read(NEXT_STATE, 0))
        self.held.write(NEXT_STATE, entry=0)
        self.scaled = False
