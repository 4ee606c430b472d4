"""Arguments as callers give them: numbers, Python's or numpy's, but no truth values and no texts; and names."""

from __future__ import annotations

import ipaddress
import math
import operator
from collections.abc import Iterable
from difflib import get_close_matches

import numpy as np

from .errors import ArgumentError

MAX_THREADS = 1024


def whole_number(value: object) -> int | None:
    """`value` as an int, or None when it is no whole number."""
    if isinstance(value, bool | np.bool_ | np.ndarray):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def finite_number(value: object) -> float | None:
    """`value` as a float, or None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def thread_count(where: str, value: object) -> int | None:
    """`value` as a number of CPU threads; None, the backend's choice, stays None.

    Raises:
        ArgumentError: no whole number in 1..1024; `where` names it.
    """
    if value is None:
        return None
    count = whole_number(value)
    if count is None or not 1 <= count <= MAX_THREADS:
        raise ArgumentError(where, "number of threads", got=value, expected=f"a whole number in 1..{MAX_THREADS}")
    return count


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question after the one of the `known` names that is nearest; empty where none is near."""
    alike = get_close_matches(str(name), list(known), n=1)
    return f"Did you mean {alike[0]!r}?" if alike else ""


def is_loopback(host: str) -> bool:
    """Whether a host, by its name or its address, is always this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
