"""What goes up to a GPU, in the host's memory, in a row: what no row changes goes up once, when it is bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime import Pipeline
from tandemrt.runtime.onnx_files import projections
from tandemrt.runtime.variant import Variant

from ..runtime.lora_writing import write_lora
from ..runtime.stand_in_gpus import Gpus, stand_in
from ..runtime.tiny_bundle import write_tiny_bundle
from ..runtime.tiny_families import write_tiny_control, write_tiny_editing, write_tiny_sdxl
from .on_gpus import ASKED, LATENT_BYTES, SIDE, TARGET, written

PICTURES = 4  # so that of what a row is given its coefficients are the smallest, but for the time step
COEFFICIENTS_BYTES = 4 * 4 * 6
SLOTS = {"lora_slots": 1, "lora_rank": 2}
VARIANTS = (
    *(Variant(step=step) for step in ("guided", "unguided", "update")),
    *(Variant(step=step, **SLOTS) for step in (None, "guided")),
)
FAMILIES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "bare": (write_tiny_bundle, ()),
    "steered": (write_tiny_control, ("unet", "unet_second")),
    "edited": (write_tiny_editing, ("unet_inpaint",)),
    "sdxl": (write_tiny_sdxl, ("unet",)),
}

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A family's bundle, and beside it a cache with step engines and update engines of its denoisers, for LoRAs too."""

    @cache
    def of(family: str) -> Path:
        write, denoisers = FAMILIES[family]
        path = written(tmp_path_factory.mktemp(family), write, dict.fromkeys(denoisers, VARIANTS))
        for seed in (1, 2):
            modules = {"unet": projections(path / "bundle" / "unet" / "model.onnx")}
            write_lora(path / f"{seed}.safetensors", modules, rank=2, seed=seed)
        return path

    return of


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89")


def opened(path: Path) -> Pipeline:
    return Pipeline.open(path / "bundle", TARGET, cache=path / "cache", threads=2)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8 * SIDE, 8 * SIDE, 3), np.uint8)


def asked(path: Path, way: str, seed: int = 1) -> dict[str, Any]:
    """A request for four rows. seed: of what no row changes."""
    mask = np.zeros((8 * SIDE, 8 * SIDE), np.uint8)
    mask[:, : 4 * SIDE] = 255
    ways: dict[str, dict[str, Any]] = {
        "plain": {"steps": {"unet": 4}},
        "noise": {"steps": {"unet": 2, "unet_second": 2}, "solver": "euler_a"},
        "LoRAs": {"steps": {"unet": 4}, "loras": {path / f"{seed}.safetensors": 1.0 / seed}},
        "channels": {"steps": {"unet_inpaint": 4}, "image": picture(seed), "mask_image": mask, "strength": 1.0},
        "ControlNet": {
            "steps": {"unet": 4},
            "control_image": {"canny": Image.fromarray(picture(seed))},
            "control_guidance_end": 0.5,
        },
    }
    prompt = ("red", "blue") if seed == 1 else ("blue red", "red")
    given = {"prompt": prompt[0], "negative_prompt": prompt[1], "num_images_per_prompt": PICTURES, "seed": 7}
    return {**ASKED, **given, **ways[way]}


def uploads(gpus: Gpus, pipe: Pipeline, **given: Any) -> tuple[list[list[int]], np.ndarray]:
    """The sizes of what went up in each row, but for coefficients and the time step; which rows drew noise."""
    rows, stream = [], pipe.stream(**given)
    for _ in stream:
        rows.append([size for kind, size in gpus.copies if kind == "HostToDevice" and size > COEFFICIENTS_BYTES])
        gpus.copies.clear()
    return rows, stream.result().plan.table.draws_noise


WAYS = [("steered", "noise"), ("steered", "LoRAs"), ("edited", "channels"), ("sdxl", "plain")]


@pytest.mark.parametrize("placement", ["batched", "parallel"], ids=["step", "update"])
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_after_the_first_row_nothing_goes_up_but_coefficients_and_noise(
    folder: Folder, gpus: Gpus, family: str, way: str, placement: str
) -> None:
    with opened(folder(family)) as pipe:
        for _ in range(2):
            rows, noisy = uploads(gpus, pipe, placement=placement, **asked(folder(family), way))
            assert rows[0]
            assert rows[1:] == [[PICTURES * LATENT_BYTES] if noise else [] for noise in noisy[1:]]
    assert noisy.any() == (way == "noise")
    assert gpus.wrong == []


def test_without_update_engines_the_denoisers_input_goes_up(folder: Folder, gpus: Gpus) -> None:
    with opened(folder("bare")) as pipe:
        rows, _ = uploads(gpus, pipe, placement="sequential", **asked(folder("bare"), "plain"))
    assert rows[1:] == [[PICTURES * LATENT_BYTES] * 2] * 3


@pytest.mark.parametrize("placement", ["batched", "parallel"], ids=["step", "update"])
def test_what_controlnets_make_goes_up_while_they_run(folder: Folder, gpus: Gpus, placement: str) -> None:
    with opened(folder("steered")) as pipe:
        rows, _ = uploads(gpus, pipe, placement=placement, **asked(folder("steered"), "ControlNet"))
    calls, branches = (1, 2) if placement == "batched" else (2, 1)
    latent = branches * PICTURES * LATENT_BYTES
    # What the ControlNet reads, and its three results; after its last row zeros in their place, once.
    assert [len(row) for row in rows[1:]] == [4 * calls, 3 * calls, 0]
    assert rows[1].count(latent) >= calls
    assert gpus.wrong == []


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("placement", ["batched", "parallel"], ids=["step", "update"])
@pytest.mark.parametrize(
    ("family", "way"), [("steered", "ControlNet"), ("steered", "LoRAs"), ("edited", "channels"), ("sdxl", "plain")]
)
def test_what_the_next_request_brings_goes_up_in_the_place_of_the_last_ones(
    folder: Folder, gpus: Gpus, family: str, way: str, placement: str, streamed: bool
) -> None:
    path, made = folder(family), dict[int, list[np.ndarray]]()

    def paint(pipe: Pipeline, seed: int) -> None:
        given = {**asked(path, way, seed), "placement": placement}
        out = pipe.stream(**given).result() if streamed else pipe(**given)
        made.setdefault(seed, []).append(out.latents)

    for seed in (1, 2):
        with opened(path) as pipe:
            paint(pipe, seed)
    with opened(path) as pipe:
        for seed in (1, 2, 1):
            paint(pipe, seed)
    assert np.abs(made[1][0] - made[2][0]).max() > 1e-3
    for same in made.values():
        for one in same[1:]:
            np.testing.assert_array_equal(one, same[0])
    assert gpus.wrong == []
