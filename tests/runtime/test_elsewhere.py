"""Branches of guidance that run in another process, and texts encoded ahead: the bits of a run in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import ExecutionError, Pipeline, RequestError, TandemError
from tandemrt.runtime.backends.base import Array

from .tiny_bundle import write_tiny_bundle
from .tiny_families import write_tiny_sdxl

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_small": 2}, "seed": 7}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize("asked", [{}, {"num_images_per_prompt": 2, "solver": "euler_a"}, {"guidance_scale": 1.0}])
def test_a_branch_elsewhere_is_the_branch_here(asked: dict[str, Any], bundle: Path, pipe: Pipeline) -> None:
    ran: list[str] = []

    def elsewhere(name: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        ran.append(name)
        return pipe.run_component(name, {one: values.copy() for one, values in inputs.items()})

    with Pipeline.open(bundle, threads=1, elsewhere=elsewhere) as apart:
        output = apart(**JOB, **asked, placement="parallel")
        guided = "guidance_scale" not in asked
        assert ran == (["unet", "unet", "unet_small", "unet_small"] if guided else [])
        wanted = pipe(**JOB, **asked, placement="sequential")
        np.testing.assert_array_equal(output.latents, wanted.latents)
        assert output.images == wanted.images
        assert all(row.placement == "parallel" for row in output.plan.ran if row.guided)
        ran.clear()
        np.testing.assert_array_equal(apart(**JOB, **asked).latents, pipe(**JOB, **asked).latents)
        assert ran == []


def test_what_comes_from_elsewhere_is_looked_at(bundle: Path) -> None:
    answers: list[Mapping[str, Array]] = [{}, {"out_sample": np.zeros((1, 4, 8, 9), np.float32)}]
    for answer in answers:
        with (
            Pipeline.open(bundle, threads=1, elsewhere=lambda _, inputs, answer=answer: answer) as apart,  # type: ignore[misc]
            pytest.raises(ExecutionError, match="unet: outputs from elsewhere, got"),
        ):
            apart(**JOB, placement="parallel")


def test_what_a_branch_elsewhere_cannot_do(bundle: Path, pipe: Pipeline) -> None:
    with (
        Pipeline.open(bundle, threads=1, elsewhere=pipe.run_component) as apart,
        pytest.raises(RequestError, match="placement hybridiff, with a branch elsewhere"),
    ):
        apart(**{**JOB, "steps": {"unet": 24}}, placement="hybridiff")


def test_a_component_alone(pipe: Pipeline) -> None:
    with pytest.raises(TandemError, match="no such component, got 'unet_nowhere'"):
        pipe.run_component("unet_nowhere", {})
    with pytest.raises(ExecutionError, match="unet"):
        pipe.run_component("unet", {"sample": np.zeros((1, 4, 8, 8), np.float32)})


@pytest.mark.parametrize(
    "texts", [{}, {"prompt": ["red", "blue"], "negative_prompt": "green"}, {"guidance_scale": 1.0}]
)
def test_texts_that_are_encoded_ahead(texts: dict[str, Any], pipe: Pipeline) -> None:
    job = {**JOB, **texts}
    embeds = pipe.encode_prompt(**job)
    assert ("negative_prompt_embeds" in embeds) == ("guidance_scale" not in texts)
    without = {name: value for name, value in job.items() if not name.endswith("prompt")}
    np.testing.assert_array_equal(pipe(**without, **embeds).latents, pipe(**job).latents)
    again = pipe.encode_prompt(**without, **embeds)
    assert all(again[name] is values for name, values in embeds.items())
    with pytest.raises(RequestError, match="loras: given to encode_prompt"):
        pipe.encode_prompt(**job, loras={"a.safetensors": 1.0})


def test_pooled_texts_that_are_encoded_ahead(tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "xl")
    with Pipeline.open(tmp_path / "xl", threads=1) as pipe:
        for texts in ({}, {"negative_prompt": "blue"}):
            job = {"prompt": "red", "prompt_2": "green", **texts}
            rest = {"steps": 2, "seed": 7}
            embeds = pipe.encode_prompt(**job, **rest)
            assert len(embeds) == 4
            np.testing.assert_array_equal(pipe(**rest, **embeds).latents, pipe(**job, **rest).latents)
