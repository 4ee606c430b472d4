"""Numbers as callers give them: Python's or numpy's, but no truth values and no texts."""

from __future__ import annotations

import math
import operator

import numpy as np


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
