"""The checker accepts what a caption says and nothing else."""

import random
from dataclasses import replace

import numpy as np
import pytest

from tandemrt.bench.shapes.checker import check, objects_in, shows
from tandemrt.bench.shapes.mistakes import MISTAKES, with_one_mistake
from tandemrt.bench.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Item, Scene, render, scenes

RED_SQUARE = Scene((Item("red", "square"),), None, "white", True)


def test_every_real_render_is_accepted():
    chosen = scenes(100, 200, "held_out") + scenes(100, 40, "train")
    refused = [scene.caption for scene in chosen if not check(render(scene), scene).all_right]
    assert refused == []


def test_every_shape_in_every_color_on_every_background_is_recognised():
    for color in COLORS:
        for number, shape in enumerate(SHAPES):
            background = list(BACKGROUNDS)[number % len(BACKGROUNDS)]
            found_background, found = objects_in(render(Scene((Item(color, shape),), None, background, True)))
            assert (found_background, [(f.color, f.shape) for f in found]) == (background, [(color, shape)])


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_scene_with_one_mistake_is_refused(kind):
    rng = random.Random(kind)
    tried, accepted = 0, []
    for scene in scenes(101, 60, "held_out"):
        wrong = MISTAKES[kind](scene, rng)
        if wrong is None:
            continue
        tried += 1
        if check(render(wrong), scene).all_right:
            accepted.append((scene.caption, wrong.caption))
    assert tried >= 20
    assert accepted == []


def test_the_verdict_says_which_attribute_is_wrong():
    rng = random.Random(0)
    scene = next(s for s in scenes(102, 50, "held_out") if s.relation and s.names_background)
    verdicts = {
        kind: check(render(MISTAKES[kind](scene, rng)), scene)
        for kind in ("other_color", "other_background", "swapped")
    }
    assert [verdicts["other_color"].background, verdicts["other_color"].items] == [True, False]
    assert [verdicts["other_background"].background, verdicts["other_background"].items] == [False, True]
    assert [verdicts["swapped"].items, verdicts["swapped"].relation] == [True, False]


def test_mistakes_take_turns_and_differ_from_what_was_asked():
    chosen = scenes(103, 60, "held_out")
    wrong = with_one_mistake(chosen, seed=0)
    assert wrong == with_one_mistake(chosen, seed=0)
    assert all(painted != asked for painted, asked in zip(wrong, chosen, strict=True))
    changed_backgrounds = sum(p.background != a.background for p, a in zip(wrong, chosen, strict=True))
    fewer_items = sum(len(p.items) < len(a.items) for p, a in zip(wrong, chosen, strict=True))
    assert changed_backgrounds > 0
    assert fewer_items > 0


def test_a_background_the_caption_does_not_name_is_free():
    scene = replace(RED_SQUARE, names_background=False)
    assert check(render(replace(scene, background="black")), scene).all_right


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_blank_picture_shows_nothing(name):
    picture = np.full((64, 64, 3), BACKGROUNDS[name], np.uint8)
    assert objects_in(picture) == (name, [])
    assert not check(picture, replace(RED_SQUARE, background=name)).all_right


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_refused(seed):
    picture = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    assert not any(check(picture, scene).all_right for scene in scenes(seed, 3, "held_out"))


def test_a_picture_of_one_color_alone_is_refused():
    picture = np.full((64, 64, 3), COLORS["red"], np.uint8)
    assert not check(picture, replace(RED_SQUARE, names_background=False)).all_right


def test_a_speck_does_not_count_as_an_object_but_a_third_item_does():
    picture = render(RED_SQUARE)
    speckled = picture.copy()
    speckled[2:6, 2:6] = COLORS["blue"]
    assert check(speckled, RED_SQUARE).all_right
    crowded = picture.copy()
    crowded[1:9, 1:9] = COLORS["blue"]
    assert not check(crowded, RED_SQUARE).items


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((64, 64), np.uint8),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
    ids=["float", "gray", "channels first", "small"],
)
def test_other_arrays_than_a_64_pixel_uint8_picture_are_an_error(picture):
    with pytest.raises(ValueError, match=r"expected \(64, 64, 3\) uint8"):
        check(picture, RED_SQUARE)


def test_pictures_are_scored_by_their_captions_alone():
    chosen = scenes(102, 12, "held_out")
    captions = [scene.caption for scene in chosen]
    pictures = np.stack([render(scene) for scene in chosen])
    assert shows(captions, pictures) == [True] * 12
    assert shows(captions, np.roll(pictures, 1, axis=0)) != [True] * 12
