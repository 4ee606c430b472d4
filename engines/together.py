"""Several things asked for at once, of which all that cannot be are told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..runtime.errors import TandemError

Value = TypeVar("Value")
Made = TypeVar("Made")


def for_each(values: Sequence[Value], make: Callable[[Value], Made], option: str) -> tuple[Made, ...]:
    """What `make` returns for each of the values that were given to an option.

    Raises:
        TandemError: what `make` raised; of the first one's class, with the words of all, where it raised several times.
    """
    made: list[Made] = []
    refused: list[TandemError] = []
    for value in values:
        try:
            made.append(make(value))
        except TandemError as error:  # noqa: PERF203 (all of them are what is wanted)
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        numbered = " ".join(f"({number}) {error}" for number, error in enumerate(refused, start=1))
        what = f"{len(refused)} of {len(values)} cannot be used: {numbered.removesuffix('.')}"
        raise type(refused[0])(option, what)
    return tuple(made)
