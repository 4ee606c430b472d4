"""Pipelines that tell what their models are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends.base import Array

from .tiny_bundle import write_tiny_bundle

ARGUMENTS = {"prompt": "red blue", "steps": {"unet": 1, "unet_small": 2}, "seed": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("observed") / "bundle"
    write_tiny_bundle(folder)
    return folder


class Told:
    """Keeps the names of what ran, and the shape of its first input."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, tuple[int, ...]]] = []

    def __call__(self, name: str, inputs: Mapping[str, Array]) -> None:
        self.runs.append((name, next(iter(inputs.values())).shape))


@pytest.mark.parametrize(
    ("placement", "denoising"),
    [
        ("batched", [("unet", (2, 4, 8, 8)), *[("unet_small", (2, 4, 8, 8))] * 2]),
        ("sequential", [*[("unet", (1, 4, 8, 8))] * 2, *[("unet_small", (1, 4, 8, 8))] * 4]),
    ],
)
def test_every_run_is_told_in_order_and_text_is_encoded_each_time(
    bundle: Path, placement: str, denoising: list[tuple[str, tuple[int, ...]]]
) -> None:
    told = Told()
    expected = [*[("text_encoder", (1, 12))] * 2, *denoising, ("vae_decoder", (1, 4, 8, 8))]
    with Pipeline.open(bundle, threads=1, observe=told) as pipeline:
        for _ in range(2):
            told.runs.clear()
            pipeline(**ARGUMENTS, placement=placement)
            assert told.runs == expected


def test_who_is_watched_paints_the_same(bundle: Path) -> None:
    with Pipeline.open(bundle, threads=1, observe=Told()) as watched, Pipeline.open(bundle, threads=1) as alone:
        one, other = watched(**ARGUMENTS), alone(**ARGUMENTS)
    assert np.array_equal(one.images, other.images)
    assert one.timings.ran_on == other.timings.ran_on
