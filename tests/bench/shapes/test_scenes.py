"""The scenes: the same for everyone, and no held-out pair ever trained."""

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest

from tandemrt.bench.shapes.scenes import BACKGROUNDS, RELATIONS, Item, Scene, render, scene_of, scenes, shape_mask
from tandemrt.runtime.errors import ArgumentError

# The first two scenes of each split. A change means that published weights, scores and pictures no longer belong to
# these scenes: Pillow draws otherwise, or the recipe has changed.
GOLDEN = {
    "train": (
        ("a yellow star above a red cross", "abb68fd9b898122e5105d9af0e7f1042c6b0b5ea15eae92a989e7cefafab3279"),
        (
            "a pink ring left of an orange cross on a gray background",
            "46ac45f6980274c4e1fa9b5d425156c9b6d946e19714faceb4b42bb2fdf59871",
        ),
    ),
    "development": (
        (
            "a green star above a blue cross on a gray background",
            "5c1b36ce5ca468a6088caff3d617bf7c2f9610e82be769983ae813bb9421e6d8",
        ),
        ("a cyan square left of an orange star", "06df27403c833cee7d214533ff05558105864d6f922721f5d8e4288d75c95bf6"),
    ),
    "held_out": (
        (
            "a red cross above a cyan ring on a white background",
            "37f1a4a408e12840a1bbcffde3dfef893696c83979d00c6bb292a7d23709b940",
        ),
        (
            "a yellow square left of an orange cross",
            "f1a5ed97ff43a9c18ce5f865e48982c9e6230d0cd96330d13da12daad1bd70ae",
        ),
    ),
}
SPLITS = ("train", "development", "held_out")


@pytest.mark.parametrize("split", SPLITS)
def test_captions_and_pixels_are_the_published_ones(split):
    made = scenes(0, 2, split)
    found = tuple((scene.caption, hashlib.sha256(render(scene).tobytes()).hexdigest()) for scene in made)
    assert found == GOLDEN[split]


def test_a_seed_names_one_sequence_of_scenes():
    assert scenes(7, 40, "train")[:20] == scenes(7, 20, "train")
    assert scenes(7, 20, "train") != scenes(8, 20, "train")


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_belong_to_the_split_they_were_drawn_for(split):
    assert {scene.split for scene in scenes(1, 300, split)} == {split}


def test_pairs_of_items_are_split_disjointly_whatever_their_order_relation_or_background():
    pairs = {
        split: {frozenset(item.name for item in scene.items) for scene in scenes(2, 4000, split) if scene.relation}
        for split in SPLITS
    }
    assert not pairs["train"] & pairs["held_out"]
    assert not pairs["train"] & pairs["development"]
    assert not pairs["development"] & pairs["held_out"]


def test_order_relation_and_background_do_not_move_a_pair_to_another_split():
    for scene in scenes(3, 100, "held_out"):
        if scene.relation is None:
            continue
        variants = [
            dataclasses.replace(scene, items=scene.items[::-1]),
            *(dataclasses.replace(scene, relation=relation) for relation in RELATIONS),
            *(dataclasses.replace(scene, background=name, names_background=True) for name in BACKGROUNDS),
        ]
        assert {variant.split for variant in variants} == {"held_out"}


def test_splits_hold_about_their_shares_of_all_pairs():
    names = [f"{color} {shape}" for color in ("red", "green", "blue", "pink") for shape in ("circle", "star", "ring")]
    items = [Item(*name.split()) for name in names]
    pairs = [Scene((a, b), "above", "white", False) for i, a in enumerate(items) for b in items[i + 1 :]]
    singles = [Scene((item,), None, background, True) for item in scenes_items() for background in BACKGROUNDS]
    counts = Counter(scene.split for scene in (*pairs, *singles))
    total = sum(counts.values())
    assert counts["held_out"] / total == pytest.approx(0.10, abs=0.05)
    assert counts["development"] / total == pytest.approx(0.04, abs=0.03)


def test_scenes_use_only_the_two_relations_and_both_of_them():
    drawn = scenes(4, 400, "train")
    assert {scene.relation for scene in drawn} == {None, *RELATIONS} == {None, "left of", "above"}
    two = sum(len(scene.items) == 2 for scene in drawn) / len(drawn)
    assert two == pytest.approx(0.7, abs=0.08)
    assert all(scene.items[0].name != scene.items[1].name for scene in drawn if len(scene.items) == 2)


def test_items_stand_where_the_caption_says_and_do_not_touch():
    for scene in scenes(5, 300, "train"):
        if scene.relation is None:
            continue
        axis = 0 if scene.relation == "left of" else 1
        first, second = scene.items
        assert second.center[axis] - first.center[axis] > 30
        covered = [shape_mask(item.shape, item.center, item.radius) for item in scene.items]
        assert not np.logical_and(*covered).any()


def test_captions_name_what_they_should():
    red, orange = Item("red", "circle"), Item("orange", "star")
    assert Scene((red,), None, "tan", False).caption == "a red circle"
    assert Scene((orange,), None, "tan", True).caption == "an orange star on a tan background"
    both = Scene((red, orange), "left of", "black", True)
    assert both.caption == "a red circle left of an orange star on a black background"


def test_a_render_is_a_64_pixel_rgb_picture_of_its_background_and_item():
    picture = render(Scene((Item("red", "square"),), None, "tan", False))
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == BACKGROUNDS["tan"]
    assert tuple(picture[32, 32]) == (220, 30, 30)


def scenes_items():
    return [Item(color, shape) for color in ("red", "cyan", "orange") for shape in ("square", "cross", "triangle")]


def test_a_caption_is_read_back():
    for scene in scenes(5, 300, "train"):
        told = scene_of(scene.caption)
        assert told.caption == scene.caption
        assert [item.name for item in told.items] == [item.name for item in scene.items]
        assert (told.relation, told.names_background) == (scene.relation, scene.names_background)
        assert told.background == (scene.background if scene.names_background else "white")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a castle",
        "a red circle left of",
        "an red circle",
        "a red circle on a pink background",
        "a red circle on a tan",
        "a red circle left of a blue square above a tan ring",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ArgumentError, match="no caption of the shapes family"):
        scene_of(caption)
