"""Scores: what is counted, and that they come out the same however pictures are painted."""

import dataclasses
import random

import numpy as np
import pytest

from tandemrt.bench.shapes.accuracy import (
    ONE_STEP,
    WAYS,
    Share,
    paint,
    score_pictures,
    score_ways,
    size_of,
)
from tandemrt.bench.shapes.mistakes import other_background, swapped
from tandemrt.bench.shapes.scenes import render, scenes
from tandemrt.runtime import Pipeline
from tandemrt.runtime.plan import Schedule, compile_plan

FEW = tuple(dataclasses.replace(way, steps=dict.fromkeys(way.denoisers, 1)) for way in WAYS if way.name != "15/10")


@pytest.fixture(scope="module")
def pipeline(shapes_bundle):
    with Pipeline.open(shapes_bundle, threads=1) as opened:
        yield opened


def test_real_renders_score_one_in_every_column():
    chosen = scenes(0, 12, "held_out")
    pictures = [render(scene) for scene in chosen]
    score = score_pictures(pictures, chosen, pictures)
    assert (score.all_right, score.order_blind) == (Share(12, 12), Share(12, 12))
    assert score.one_object.trials + score.two_objects.trials == 12
    assert score.one_object.successes + score.two_objects.successes == 12
    assert score.psnr_db == 99.0


def test_a_swapped_pair_is_wrong_but_not_to_the_order_blind_column():
    chosen = [scene for scene in scenes(0, 12, "held_out") if scene.relation][:4]
    score = score_pictures([render(swapped(scene, None)) for scene in chosen], chosen)
    assert (score.all_right, score.two_objects, score.order_blind) == (Share(0, 4), Share(0, 4), Share(4, 4))
    assert (score.one_object, score.psnr_db) == (Share(0, 0), None)


def test_a_wrong_background_is_wrong_to_the_order_blind_column_too():
    chosen = [scene for scene in scenes(0, 12, "held_out") if scene.names_background][:3]
    rng = random.Random(0)
    score = score_pictures([render(other_background(scene, rng)) for scene in chosen], chosen)
    assert (score.all_right, score.order_blind) == (Share(0, 3), Share(0, 3))


def test_a_share_has_its_interval_and_none_without_trials():
    facts = Share(81, 263).facts()
    assert (facts["low"], facts["high"]) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Share(0, 0).facts() == {"share": None, "low": None, "high": None, "successes": 0, "trials": 0}


@pytest.mark.parametrize("split", ["train", "development"])
def test_scenes_that_models_saw_are_not_scored(split):
    with pytest.raises(ValueError, match="held-out"):
        score_ways(None, [*scenes(0, 2, "held_out"), *scenes(0, 1, split)])


def test_ways_take_25_steps_or_one():
    assert [sum(way.steps.values()) for way in WAYS] == [25, 25, 25, 25, 25, 1]
    assert [way.name for way in WAYS] == ["25/0", "15/10", "10/15", "5/20", "0/25", "one step"]


def test_the_one_step_way_is_the_formula_it_was_trained_by(pipeline):
    manifest = pipeline.bundle.manifest
    plan = compile_plan(manifest, Schedule(steps=ONE_STEP.steps, **ONE_STEP.arguments))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.prod(1 - betas)
    assert plan.table.timesteps.tolist() == [999]
    assert plan.guided == (False,)
    assert plan.table.transition[0, 0, 0] == pytest.approx(signal**-0.5, rel=1e-6)
    assert plan.table.prediction[0, 0] == pytest.approx(-((1 - signal) ** 0.5) / signal**0.5, rel=1e-6)
    by_the_bundle = compile_plan(manifest, Schedule(steps=ONE_STEP.steps, guidance_scale=0))
    assert by_the_bundle.facts() == plan.facts()


def test_pictures_do_not_depend_on_how_prompts_are_batched(pipeline):
    prompts = [scene.caption for scene in scenes(0, 5, "held_out")]
    done = []
    one_by_one = paint(pipeline, FEW[0], prompts, batch=1)
    in_pairs = paint(pipeline, FEW[0], prompts, batch=2, progress=lambda *facts: done.append(facts))
    assert one_by_one.shape == (5, 64, 64, 3)
    assert one_by_one.dtype == np.uint8
    assert np.abs(one_by_one.astype(int) - in_pairs).max() <= 1
    assert done == [("25/0", 2, 5), ("25/0", 4, 5), ("25/0", 5, 5)]
    assert len({picture.tobytes() for picture in one_by_one}) == 5


def test_scores_are_the_same_every_time_and_relate_to_the_first_way(pipeline):
    chosen = scenes(0, 3, "held_out")
    scores = score_ways(pipeline, chosen, FEW, batch=3)
    assert list(scores) == [way.name for way in FEW]
    assert scores["25/0"].psnr_db is None
    assert all(0 < score.psnr_db < 99 for name, score in scores.items() if name != "25/0")
    assert scores == score_ways(pipeline, chosen, FEW, batch=3)


def test_sizes_add_up_over_components(pipeline):
    manifest = pipeline.bundle.manifest
    large, small, both = (size_of(manifest, names) for names in (["unet"], ["unet_small"], ["unet", "unet_small"]))
    assert large["parameters"] == manifest.components["unet"].parameters > small["parameters"]
    assert both["parameters"] == large["parameters"] + small["parameters"]
    # In fp32 a parameter takes four bytes, and the graph a little more.
    assert large["megabytes"] == pytest.approx(large["parameters"] * 4e-6, rel=0.1)
    assert both["megabytes"] == pytest.approx(large["megabytes"] + small["megabytes"], abs=0.02)
