"""Scenes that a caption does not describe: what an exact checker must refuse."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .scenes import BACKGROUNDS, COLORS, SHAPES, Item, Scene

Mistake = Callable[[Scene, random.Random], "Scene | None"]


def other_color(scene: Scene, rng: random.Random) -> Scene:
    """One item has another color."""
    return _with_one_item_changed(scene, rng, lambda item: replace(item, color=_other(rng, COLORS, item.color)))


def other_shape(scene: Scene, rng: random.Random) -> Scene:
    """One item has another shape."""
    return _with_one_item_changed(scene, rng, lambda item: replace(item, shape=_other(rng, SHAPES, item.shape)))


def other_background(scene: Scene, rng: random.Random) -> Scene | None:
    """The background is another than the caption names; None where it names none."""
    if not scene.names_background:
        return None
    return replace(scene, background=_other(rng, BACKGROUNDS, scene.background))


def swapped(scene: Scene, rng: random.Random) -> Scene | None:
    """Two items have changed places; None where there is one."""
    if len(scene.items) == 1:
        return None
    return replace(scene, items=_at_places_of(scene.items[::-1], scene.items))


def turned(scene: Scene, rng: random.Random) -> Scene | None:
    """Items that should stand side by side stand one above the other, or the reverse; None where there is one."""
    if len(scene.items) == 1:
        return None
    return replace(scene, items=tuple(replace(item, center=item.center[::-1]) for item in scene.items))


def missing(scene: Scene, rng: random.Random) -> Scene | None:
    """One of two items is not there; None where there is one."""
    if len(scene.items) == 1:
        return None
    return replace(scene, items=(rng.choice(scene.items),))


MISTAKES: dict[str, Mistake] = {
    mistake.__name__: mistake for mistake in (other_color, other_shape, other_background, swapped, turned, missing)
}


def with_one_mistake(scenes: Sequence[Scene], seed: int) -> tuple[Scene, ...]:
    """For each scene one that differs in one attribute its caption speaks of; the kinds take turns."""
    rng = random.Random(seed)
    wrong = []
    for n, scene in enumerate(scenes):
        made = [other for mistake in MISTAKES.values() if (other := mistake(scene, rng)) is not None]
        wrong.append(made[n % len(made)])
    return tuple(wrong)


def _with_one_item_changed(scene: Scene, rng: random.Random, changed: Callable[[Item], Item]) -> Scene:
    items = list(scene.items)
    index = rng.randrange(len(items))
    items[index] = changed(items[index])
    return replace(scene, items=tuple(items))


def _other(rng: random.Random, choices: Iterable[str], taken: str) -> str:
    return rng.choice([choice for choice in choices if choice != taken])


def _at_places_of(items: tuple[Item, ...], places: tuple[Item, ...]) -> tuple[Item, ...]:
    return tuple(replace(item, center=place.center) for item, place in zip(items, places, strict=True))
