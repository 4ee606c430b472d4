"""How few layers have to stay in floating point for a budget to hold."""

from __future__ import annotations

from collections.abc import Callable


def fewest_kept(layers: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest count of layers to keep for which `holds` is true, if it stays true of more; None if it never is.

    layers: how many there are; with all of them kept nothing would be quantized, so that is never tried.
    holds: asked of each count once at most: 0, 1, 2, 4 and so on, then halving what lies between.
    """
    fails, tried = -1, 0
    while not holds(tried):
        if tried >= layers - 1:
            return None
        fails, tried = tried, min(max(1, 2 * tried), layers - 1)
    while tried - fails > 1:
        between = (tried + fails) // 2
        if holds(between):
            tried = between
        else:
            fails = between
    return tried
