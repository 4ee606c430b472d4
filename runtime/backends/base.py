"""What every backend offers: sessions that hold a compiled model, and bindings that run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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
