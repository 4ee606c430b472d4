"""Exact scoring of pictures of the shapes family: does a picture show what its caption says?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from .scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES, Scene, scene_of, shape_mask

MINIMUM_IOU = 0.75
MINIMUM_PURITY = 0.7
MINIMUM_PIXELS = 24

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

_PALETTE_NAMES = (*COLORS, *BACKGROUNDS)
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Found:
    """One object seen in a picture; `shape` or `color` is None where no candidate passes its threshold."""

    shape: str | None
    color: str | None
    center: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a picture got right; `items` ignores which object is where, `relation` is about the order alone."""

    background: bool
    items: bool
    relation: bool

    @property
    def all_right(self) -> bool:
        return self.background and self.items and self.relation


def check(picture: Pixels, scene: Scene) -> Verdict:
    """Compare a (64, 64, 3) uint8 RGB picture with the scene its prompt came from.

    Objects are the connected regions that differ from the background. A shape counts when its rendered template
    overlaps the region by IoU > 0.75 and no other template fits better, a color when more than 70% of the region's
    inner pixels are nearest to it in the palette. Regions under 24 pixels are specks and do not count as objects.
    Positions and sizes are free; only the order that the relation names is checked.

    Raises:
        ValueError: the picture is not (64, 64, 3) uint8.
    """
    if picture.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or picture.dtype != np.uint8:
        raise ValueError(f"picture: got {picture.shape} {picture.dtype}, expected (64, 64, 3) uint8")
    background, found = objects_in(picture)
    wanted = [(item.shape, item.color) for item in scene.items]
    items = sorted(wanted) == sorted((f.shape or "", f.color or "") for f in found)
    in_order = items
    if items and scene.relation is not None:
        axis = 0 if scene.relation == "left of" else 1
        ordered = sorted(found, key=lambda f: f.center[axis])
        apart = [abs(first - second) for first, second in zip(found[0].center, found[1].center, strict=True)]
        in_order = [(f.shape, f.color) for f in ordered] == wanted and apart[axis] > apart[1 - axis]
    return Verdict(not scene.names_background or background == scene.background, items, in_order)


def shows(captions: Sequence[str], pictures: Pixels) -> list[bool]:
    """Whether pictures, (B, 64, 64, 3) uint8, show all that their captions say; for `tandemrt calibrate --scorer`.

    Raises:
        ArgumentError: a caption is none of this family.
        ValueError: a picture is not (64, 64, 3) uint8.
    """
    scenes = [scene_of(caption) for caption in captions]
    return [check(picture, scene).all_right for picture, scene in zip(pictures, scenes, strict=True)]


def objects_in(picture: Pixels) -> tuple[str, list[Found]]:
    """The background's color name and the objects of a (64, 64, 3) uint8 picture."""
    nearest = _nearest_palette_index(picture)
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background_index = int(np.bincount(border[border >= len(COLORS)], minlength=len(_PALETTE)).argmax())
    distance = np.linalg.norm(picture.astype(np.float32) - _PALETTE[background_index], axis=-1)
    labels, count = ndimage.label(distance > 70)
    regions = [labels == k + 1 for k in range(count)]
    found = [_described(region, nearest) for region in regions if region.sum() >= MINIMUM_PIXELS]
    return _PALETTE_NAMES[background_index], found


def _nearest_palette_index(picture: Pixels) -> npt.NDArray[np.intp]:
    difference = picture.astype(np.float32)[:, :, None, :] - _PALETTE
    nearest: npt.NDArray[np.intp] = np.square(difference).sum(-1).argmin(-1)
    return nearest


def _described(region: Mask, nearest: npt.NDArray[np.intp]) -> Found:
    rows, columns = np.nonzero(region)
    inner = ndimage.binary_erosion(region)
    votes = np.bincount(nearest[inner if inner.sum() >= 8 else region], minlength=len(_PALETTE))
    winner = int(votes[: len(COLORS)].argmax())
    color = _PALETTE_NAMES[winner] if votes[winner] > MINIMUM_PURITY * votes.sum() else None
    scores = {shape: _best_iou(shape, region) for shape in SHAPES}
    best = max(scores, key=lambda shape: scores[shape])
    shape = best if scores[best] > MINIMUM_IOU else None
    return Found(shape, color, (float(columns.mean()), float(rows.mean())))


def _best_iou(shape: str, region: Mask) -> float:
    """The best overlap of a shape's template with a region, over positions and sizes near the region's extent."""
    rows, columns = np.nonzero(region)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    reach = {"square": (0.85, 0.85, 0.85), "triangle": (1.0, 0.75, 0.95), "star": (1.1, 0.89, 1.046)}
    up, down, side = reach.get(shape, (1.0, 1.0, 1.0))
    radius = ((bottom - top) / (up + down) + (right - left) / (2 * side)) / 2
    x, y = (left + right) / 2, top + (bottom - top) * up / (up + down)
    best = 0.0
    for dx, dy, dr in itertools.product((-0.7, 0.0, 0.7), (-0.7, 0.0, 0.7), (-0.8, 0.0, 0.8)):
        template = shape_mask(shape, (x + dx, y + dy), radius + dr)
        union = np.count_nonzero(template | region)
        best = max(best, np.count_nonzero(template & region) / union)
    return best
