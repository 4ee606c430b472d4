"""Scenes of coloured shapes: what a caption says and the picture it means, both exact and repeatable."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tandemrt.runtime.errors import ArgumentError

IMAGE_SIZE = 64
SUPERSAMPLING = 4

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (40, 60, 220),
    "yellow": (250, 220, 30),
    "purple": (140, 40, 180),
    "orange": (250, 130, 20),
    "cyan": (40, 200, 220),
    "pink": (250, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "tan": (205, 175, 130),
}
RELATIONS = ("left of", "above")

Split = Literal["train", "development", "held_out"]


@dataclass(frozen=True, slots=True)
class Item:
    """One coloured shape; `center` and `radius` are in pixels of a 64x64 picture."""

    color: str
    shape: str
    center: tuple[float, float] = (IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    radius: float = 17.0

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two items on a plain background; `names_background` says whether the caption mentions it."""

    items: tuple[Item, ...]
    relation: str | None
    background: str
    names_background: bool

    @property
    def caption(self) -> str:
        """The prompt, for example `a red circle left of a blue square on a white background`."""
        text = f" {self.relation} ".join(f"{_article(item.color)} {item.name}" for item in self.items)
        return f"{text} on a {self.background} background" if self.names_background else text

    @property
    def split(self) -> Split:
        """Which part of the data the caption belongs to, by a hash of its content.

        Two items: the unordered pair of (color, shape) decides, so a held-out pair is never trained in any order,
        relation or background. One item: the item with the background its caption names, if any.
        """
        key = " + ".join(sorted(item.name for item in self.items))
        if len(self.items) == 1:
            key += f" on {self.background if self.names_background else 'anything'}"
        bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
        return "held_out" if bucket < 10 else "development" if bucket < 14 else "train"


def random_scene(rng: random.Random, split: Split) -> Scene:
    """Draw a scene of `split`: 30% hold one item, 70% two different ones side by side or one above the other."""
    one = rng.random() < 0.3
    while True:
        items = tuple(_random_item(rng) for _ in range(1 if one else 2))
        relation = None if one else rng.choice(RELATIONS)
        scene = Scene(_placed(items, relation, rng), relation, rng.choice(tuple(BACKGROUNDS)), rng.random() < 0.5)
        if scene.split == split and (one or items[0].name != items[1].name):
            return scene


def scenes(seed: int, count: int, split: Split) -> tuple[Scene, ...]:
    """`count` scenes of `split`, the same ones for the same `seed` on every machine."""
    rng = random.Random(f"{split}:{seed}")
    return tuple(random_scene(rng, split) for _ in range(count))


def scene_of(caption: str) -> Scene:
    """The scene that a caption tells, its items in the middle; on white where the caption names no background.

    Raises:
        ArgumentError: no caption of this family.
    """
    text, on, named = caption.partition(" on a ")
    relation = next((one for one in RELATIONS if f" {one} " in text), None)
    names = text.split(f" {relation} ") if relation else [text]
    items = tuple(Item(*name.split(" ", 2)[1:]) for name in names if name.count(" ") == 2)
    scene = Scene(items, relation, named.removesuffix(" background") or "white", bool(on))
    known = (
        bool(items)
        and all(item.color in COLORS and item.shape in SHAPES for item in items)
        and scene.background in BACKGROUNDS
    )
    if not known or scene.caption != caption:
        expected = f"such as {Scene((Item('red', 'circle'), Item('blue', 'square')), 'left of', 'tan', True).caption!r}"
        raise ArgumentError("prompt", "no caption of the shapes family", got=caption, expected=expected)
    return scene


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """Paint `scene`: (64, 64, 3) uint8 RGB, drawn at four times the size and box-filtered."""
    big = IMAGE_SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    for item in scene.items:
        canvas.paste(COLORS[item.color], mask=_coverage(item.shape, item.center, item.radius))
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def shape_mask(shape: str, center: tuple[float, float], radius: float) -> npt.NDArray[np.bool_]:
    """The pixels a shape covers by more than half: (64, 64) bool."""
    mask = _coverage(shape, center, radius).convert("L").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(mask) > 127


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _random_item(rng: random.Random) -> Item:
    return Item(rng.choice(tuple(COLORS)), rng.choice(SHAPES))


def _placed(items: tuple[Item, ...], relation: str | None, rng: random.Random) -> tuple[Item, ...]:
    half, near, far = IMAGE_SIZE / 2, 15.0, IMAGE_SIZE - 15.0
    if relation is None:
        centers = [(half, half)]
    elif relation == "left of":
        centers = [(near, half), (far, half)]
    else:
        centers = [(half, near), (half, far)]
    # Two items keep at least 5 pixels between them, so that a decoder's blur does not join them.
    low, high, shift = (15.0, 20.0, 2.0) if len(items) == 1 else (11.5, 13.5, 1.0)
    return tuple(
        Item(
            item.color,
            item.shape,
            (x + rng.uniform(-shift, shift), y + rng.uniform(-shift, shift)),
            rng.uniform(low, high),
        )
        for item, (x, y) in zip(items, centers, strict=True)
    )


def _coverage(shape: str, center: tuple[float, float], radius: float) -> Image.Image:
    """One-bit mask of a shape on the four-times canvas."""
    size = IMAGE_SIZE * SUPERSAMPLING
    x, y, r = center[0] * SUPERSAMPLING, center[1] * SUPERSAMPLING, radius * SUPERSAMPLING
    mask = Image.new("1", (size, size))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
        if shape == "ring":
            draw.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), fill=0)
    elif shape == "square":
        side = 0.85 * r
        draw.rectangle((x - side, y - side, x + side, y + side), fill=1)
    elif shape == "cross":
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=1)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=1)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - 0.95 * r, y + 0.75 * r), (x + 0.95 * r, y + 0.75 * r)], fill=1)
    else:
        spikes = [((1.1 if k % 2 == 0 else 0.5) * r, math.pi * k / 5) for k in range(10)]
        draw.polygon([(x + rho * math.sin(phi), y - rho * math.cos(phi)) for rho, phi in spikes], fill=1)
    return mask
