"""A session whose every run is told of beforehand, with what the model is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from .backends.base import Array, Binding, Session, Shape
from .ran_on import GRAPH, Choosing, RanOn

# A component's name and its inputs, which the next run overwrites.
Observe: TypeAlias = Callable[[str, Mapping[str, Array]], None]


class ObservedSession:
    """A component's session, and who is told of its runs."""

    def __init__(self, name: str, session: Session, observe: Observe) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._name, self._session, self._observe = name, session, observe

    def serving(self, shapes: Mapping[str, Shape]) -> Session:
        """Itself: a component as it was exported has the same inputs on whatever engine."""
        return self

    def ran_on(self, shapes: Mapping[str, Shape]) -> RanOn:
        """See `Choosing`."""
        return self._session.ran_on(shapes) if isinstance(self._session, Choosing) else GRAPH

    def bind(self, input_shapes: Mapping[str, Shape]) -> Binding:
        """See `Session.bind`."""
        return _ObservedBinding(self._name, self._session.bind(input_shapes), self._observe)

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()


class _ObservedBinding:
    def __init__(self, name: str, binding: Binding, observe: Observe) -> None:
        self.inputs, self.outputs = binding.inputs, binding.outputs
        self._name, self._binding, self._observe = name, binding, observe

    def run(self) -> None:
        self._observe(self._name, self.inputs)
        self._binding.run()
