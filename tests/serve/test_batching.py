"""Requests that run as one: who may, and that each is given what it would have been alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Output, Pipeline, Request
from tandemrt.serve.batching import Batch, in_common
from tandemrt.serve.limits import Limits
from tandemrt.serve.protocol import Asked
from tandemrt.serve.served import Served
from tandemrt.serve.work import Work, work_of

from ..runtime.tiny_families import write_tiny_sdxl

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}


def work(pipe: Pipeline, asked: Mapping[str, Any], **tensors: Any) -> Work:
    return work_of(Asked(**asked), tensors, Served.of(pipe), Limits())


def painted(pipe: Pipeline, request: Request) -> Output:
    return pipe(**{field.name: getattr(request, field.name) for field in fields(Request)})


def require_each_as_alone(pipe: Pipeline, works: list[Work]) -> None:
    """What one call for all gives each, but for the last bits, is what its own call gives."""
    assert len({in_common(one) for one in works} - {None}) == 1
    batch = Batch.of(works)
    together = painted(pipe, batch.request)
    assert len(together.seeds) == sum(one.request.pictures for one in works)
    alone = [painted(pipe, one.request) for one in works]
    for one, other in pairwise(alone):
        assert not np.allclose(one.latents[0], other.latents[0], rtol=0.01, atol=0.01)
    for own, wanted in zip(batch.outputs(together), alone, strict=True):
        np.testing.assert_allclose(own.latents, wanted.latents, rtol=1e-4, atol=1e-4)
        assert (own.seeds, own.dropped_text, len(own.images)) == (wanted.seeds, wanted.dropped_text, len(wanted.images))
        for image, expected in zip(own.images, wanted.images, strict=True):
            assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() <= 1
        if wanted.handover is not None:
            assert own.handover is not None
            np.testing.assert_allclose(own.handover.state, wanted.handover.state, rtol=1e-4, atol=1e-4)
            for name in ("step", "plan", "bundle", "seed", "models"):
                assert getattr(own.handover, name) == getattr(wanted.handover, name)


@pytest.mark.parametrize(
    "jobs",
    [
        [{}, {"prompt": "blue", "seed": 8}, {"prompt": "red blue", "seed": [9]}],
        [{"until": 2}, {"until": 2, "prompt": "blue", "seed": [8]}],
        [{"solver": "euler_a"}, {"solver": "euler_a", "seed": 8}],
        [{"seed_device": "cuda"}, {"seed_device": "cuda", "seed": 8}],
        [{"negative_prompt": "blue"}, {"negative_prompt": "red", "prompt": "blue", "seed": 8}],
        [{"prompt": ["red", "blue"], "seed": [1, 2]}, {"seed": 3}],
        [
            {"num_images_per_prompt": 2, "seed": [1, 2], "negative_prompt": "red"},
            {"negative_prompt": "blue", "seed": 3},
        ],
        [{"prompt": "red " * 30}, {"prompt": "blue " * 40, "seed": 8}],
        [{"steps": 5, "guidance_scale": 1.0}, {"steps": {"unet": 5}, "guidance_scale": 1.0, "seed": 8}],
    ],
)
def test_each_is_given_what_is_its_own(jobs: list[dict[str, Any]], pipe: Pipeline) -> None:
    require_each_as_alone(pipe, [work(pipe, {**JOB, **job}) for job in jobs])


def test_states_are_gone_on_with_together(pipe: Pipeline) -> None:
    works = []
    for seed in (7, [8, 9], [10]):
        count = len(seed) if isinstance(seed, list) else 1
        job = {**JOB, "solver": "euler_a", "seed": seed, "num_images_per_prompt": count}
        state = pipe(**job, until=2).handover
        assert state is not None
        works.append(work(pipe, {**job, "start_step": 2, "plan": state.plan, "until": 5}, state=state.state))
    require_each_as_alone(pipe, works)


def test_texts_that_are_encoded_already(tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "bundle")
    rng = np.random.default_rng(1)
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipe:
        text = pipe.bundle.manifest.text
        works = []
        for count in (1, 2):
            given = {
                f"{prefix}{name}": rng.standard_normal((count if prefix == "" else 1, *shape)).astype(np.float32)
                for prefix in ("", "negative_")
                for name, shape in (
                    ("prompt_embeds", (text.max_length, text.width)),
                    ("pooled_prompt_embeds", (text.pooled_width,)),
                )
            }
            works.append(work(pipe, {"steps": 3, "seed": list(range(count))}, **given))
        require_each_as_alone(pipe, works)
        second = [{"prompt": "red", "prompt_2": "", "seed": 1}, {"prompt": "blue", "seed": 2}]
        require_each_as_alone(pipe, [work(pipe, {"steps": 3, **job}) for job in second])


def test_previews_are_told_to_whom_they_are_of(pipe: Pipeline) -> None:
    works = [work(pipe, {**JOB, "seed": seed}) for seed in (7, 8)]
    works = [replace(one, request=replace(one.request, previews=2)) for one in works]
    batch = Batch.of(works)
    request = {field.name: getattr(batch.request, field.name) for field in fields(Request)}
    events = list(pipe.stream(**request))
    for index, seed in enumerate((7, 8)):
        alone = list(pipe.stream(**{**JOB, "seed": seed}, previews=2))
        for event, wanted in zip(events, alone, strict=True):
            own = batch.event(event, index)
            assert (own.row, len(own.preview)) == (wanted.row, len(wanted.preview))
            for image, expected in zip(own.preview, wanted.preview, strict=True):
                assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() <= 1


@pytest.mark.parametrize(
    ("asked", "together"),
    [
        ({"prompt": "blue", "seed": None}, True),
        ({"steps": [("unet", 2), ("unet_free", 3)], "height": 64}, True),
        ({"steps": {"unet": 3, "unet_free": 2}}, False),
        ({"solver": "euler"}, False),
        ({"guidance_scale": 3.0}, False),
        ({"height": 96}, False),
        ({"until": 2}, False),
        ({"negative_prompt": ""}, False),  # some bundles read nothing at all where there is none
        ({"num_images_per_prompt": 2}, False),  # one generator draws the noise of both
        ({"num_images_per_prompt": 2, "seed": [1, 2]}, True),
        ({"seed_device": "cuda"}, False),
    ],
)
def test_who_may_run_with_whom(asked: Mapping[str, Any], together: bool, pipe: Pipeline) -> None:
    other = in_common(work(pipe, {**JOB, **asked}))
    assert (other is not None and other == in_common(work(pipe, JOB))) is together


def test_what_no_server_is_asked_for_runs_alone(pipe: Pipeline) -> None:
    one = work(pipe, JOB)
    latents = np.zeros(one.shape, np.float32)
    for asked in ({"latents": latents}, {"guidance": "adaptive"}, {"placement": "sequential"}):
        assert in_common(replace(one, request=replace(one.request, **asked))) is None
