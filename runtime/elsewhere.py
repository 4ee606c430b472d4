"""Models that run in another process: what stands in a session's place here, and what answers for it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .backends.base import Array, Binding, Shape
from .errors import ExecutionError
from .manifest import Component
from .models import Models
from .pool import Pool
from .ran_on import Ran, serving
from .shapes import evaluated
from .transfers import place

# One run of a component: its name and all its inputs by name, to its outputs by name. Called by one thread at a time
# for a generation, by several for several; the inputs are overwritten after it has returned.
Elsewhere = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]


class ElsewhereSession:
    """A component whose runs are done by `run`, as a session; see `Session`."""

    def __init__(self, name: str, component: Component, run: Elsewhere) -> None:
        self.inputs, self.outputs = component.inputs, component.outputs
        self._name, self._run = name, run

    def bind(self, input_shapes: Mapping[str, Shape]) -> Binding:
        """See `Session`."""
        stated = {spec.name: spec for spec in self.inputs}
        if set(stated) != set(input_shapes):
            raise ExecutionError(self._name, "inputs", got=sorted(input_shapes), expected=", ".join(stated))
        sizes: dict[str, int] = {}
        for name, shape in input_shapes.items():
            if len(shape) != len(stated[name].shape):
                raise ExecutionError(self._name, f"shape of {name}", got=shape, expected=str(stated[name].shape))
            sizes |= {str(symbol): size for symbol, size in zip(stated[name].shape, shape, strict=True)}
        outputs = {}
        for spec in self.outputs:
            made = evaluated(spec.shape, sizes)
            if made is None:
                raise ExecutionError(self._name, f"shape of {spec.name}", got=spec.shape, expected="that of inputs")
            outputs[spec.name] = np.zeros(made, spec.dtype)
        return _Binding(
            self._name, {name: np.zeros(shape, stated[name].dtype) for name, shape in input_shapes.items()}, outputs,
            self._run,
        )  # fmt: skip

    def close(self) -> None:
        """There is nothing here to free."""


class _Binding:
    """See `Binding`."""

    def __init__(self, name: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array], run: Elsewhere) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._name, self._run = name, run

    def run(self) -> None:
        made = self._run(self._name, self.inputs)
        for name, array in self.outputs.items():
            if name not in made or made[name].shape != array.shape:
                got = {one: values.shape for one, values in made.items()}
                raise ExecutionError(self._name, "outputs from elsewhere", got=got, expected=f"{name} {array.shape}")
            array[...] = made[name]


def run_alone(models: Models, pool: Pool, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """One run of a component, which another pipeline asks for; its outputs are the caller's own.

    Raises:
        ExecutionError: it failed, or takes other inputs.
    """
    with pool.lease() as lease:
        shapes = {given: values.shape for given, values in inputs.items()}
        session = serving(Ran(lease).watched(name, models.session(name)), shapes)
        binding = session.bind(shapes)
        place(binding, inputs)
        binding.run()
        return {made: values.copy() for made, values in binding.outputs.items()}
