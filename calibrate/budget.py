"""How few layers have to stay in floating point for a budget to hold."""

from __future__ import annotations

from collections.abc import Callable


def fewest_kept(most: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest count of layers to keep for which `holds` is true, if it stays true of more; None if it never is.

    most: how many can be kept.
    holds: asked of each count once at most: 0, 1, 2, 4 and so on, then halving what lies between.
    """
    fails, tried = -1, 0
    while not holds(tried):
        if tried >= most:
            return None
        fails, tried = tried, min(max(1, 2 * tried), most)
    while tried - fails > 1:
        between = (tried + fails) // 2
        if holds(between):
            tried = between
        else:
            fails = between
    return tried
