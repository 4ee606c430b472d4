"""What goes between the host and where a backend runs; where the two are one, what is written and read there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy.typing as npt

from .backends.base import Array, Binding, Handed, Handing
from .errors import ExecutionError


def place(binding: Binding, given: Mapping[str, npt.ArrayLike], left: Collection[str] = ()) -> None:
    """Write inputs that runs do not change, once: they lie where the backend runs from now on, as do those `left`.

    given: whoever changes one later has to `write` it.

    Raises:
        ExecutionError: the backend failed.
    """
    for name, values in given.items():
        binding.inputs[name][...] = values
    if isinstance(binding, Handing):
        binding.leave([*given, *left])
        binding.write(*given)


def write(binding: Binding, *names: str) -> None:
    """Have a binding run with what its host arrays hold in inputs that were left; raises as `place`."""
    if isinstance(binding, Handing):
        binding.write(*names)


def read(binding: Binding, name: str, entry: int | None = None) -> Array:
    """What a binding has in a tensor, or in one entry along its first axis, wherever that lies; raises as `place`."""
    if isinstance(binding, Handing):
        return binding.read(name, entry)
    array = binding.inputs[name] if name in binding.inputs else binding.outputs[name]
    return array if entry is None else array[entry]


def take(label: str, binding: Binding, handed: Iterable[Handed]) -> None:
    """Have a model's inputs be what others made, without the host.

    label: of the model, for errors.

    Raises:
        ExecutionError: its backend hands nothing on, or failed.
    """
    if not isinstance(binding, Handing):
        names = ", ".join(dict.fromkeys(one.name for one in handed))
        raise ExecutionError(label, "inputs handed to a backend that hands nothing on", got=names, expected="none")
    binding.take(handed)
