"""What every backend offers: sessions that hold a compiled model, and bindings that run it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from ..manifest import TensorSpec

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Binding(Protocol):
    """One model with buffers of fixed shapes; used by one thread at a time, many may share a session.

    `inputs` and `outputs` are host arrays: write the inputs in place, call `run`, read the outputs. The arrays stay
    the same objects for the binding's life, and a run overwrites the outputs.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]

    def run(self) -> None:
        """Run the model once.

        Raises:
            ExecutionError: the backend failed.
        """


class Chain(Protocol):
    """Runs of bindings, one after another, that are launched as one.

    `rows` holds for each run the host arrays of the inputs that it alone is given: write them, and the inputs of the
    bindings that all their runs share, call `run`, and read the outputs of the last run's binding.
    """

    rows: Sequence[Mapping[str, Array]]

    def run(self) -> None:
        """Do all runs.

        Raises:
            ExecutionError: the backend failed, in whichever of them.
        """


@runtime_checkable
class Chaining(Binding, Protocol):
    """A binding of a backend that launches many runs as one."""

    def chain(self, runs: Sequence[tuple[Binding, Collection[str]]], carried: Mapping[str, str]) -> Chain:
        """The runs as one, the first of this binding, the others of bindings of the same backend.

        runs: for each its binding, and the inputs that are given anew. carried: by input the output, of the same shape
            and dtype, of the run before that takes its place; the first run reads its binding's input.
        """


@dataclass(frozen=True, slots=True)
class Handed:
    """What an input is given of what another binding made, `output`.

    Along the first axis, from the output's entry `first` on to the input's entry `at` on, as many as both have.
    """

    name: str
    giver: Binding
    output: str
    first: int = 0
    at: int = 0


@dataclass(frozen=True, slots=True)
class Lying:
    """An output of a binding, or its entries from `first` on, where the backend runs.

    shape: of the latent that it is, or is made of, (B, C, h, w).
    """

    binding: Binding
    name: str
    shape: Shape
    first: int = 0

    def handed(self, name: str, at: int = 0) -> Handed:
        """It as what an input is given; see `Handed`."""
        return Handed(name, self.binding, self.name, self.first, at)


@runtime_checkable
class Handing(Binding, Protocol):
    """A binding of a backend that hands tensors to others without the host."""

    def leave(self, names: Collection[str]) -> None:
        """Leave these inputs and outputs where the backend runs: a run neither reads nor writes their host arrays."""

    def take(self, handed: Iterable[Handed]) -> None:
        """Copy into inputs that were left what bindings of the same backend made; now. None of them runs meanwhile.

        Raises:
            ExecutionError: the backend failed.
        """

    def read(self, name: str, entry: int | None = None) -> Array:
        """The host array of what was left, or one entry along its first axis, with what lies there copied to it; now.

        Raises:
            ExecutionError: the backend failed.
        """

    def write(self, *names: str, entry: int | None = None) -> None:
        """Copy the host arrays of what was left, or one entry of each, to where the backend runs; now.

        Raises:
            ExecutionError: the backend failed.
        """


class Session(Protocol):
    """A model loaded on a target; safe to share between threads."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self, input_shapes: Mapping[str, Shape]) -> Binding:
        """Allocate buffers for these input shapes.

        Raises:
            ExecutionError: an input is missing or unknown, or a shape does not fit the model.
        """

    def close(self) -> None:
        """Free the model; a second call does nothing."""


@runtime_checkable
class Overlapping(Session, Protocol):
    """A model that serves more runs at once than before without being loaded again."""

    def overlap(self, runs: int) -> None:
        """From now on so many runs may overlap, of this model and of others beside it; never fewer than before."""
