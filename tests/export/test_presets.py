"""Presets: the architectures have the parameters their authors state, and their checkpoints export and paint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import PresetPlan
from tandemrt.export.presets import models, preset_names, read_preset
from tandemrt.export.random_checkpoint import build, write_checkpoint
from tandemrt.export.random_tokenizer import write_tokenizer
from tandemrt.export.sources import read_sources
from tandemrt.export.tokenizer import load_clip_tokenizer
from tandemrt.runtime import Pipeline
from tandemrt.runtime.errors import ArgumentError

from ..engines.families import require_engines
from ..interop.picture import psnr_db
from .family import at_depth

# Published counts are rounded to two digits at worst.
ROUNDING = 0.03
PROMPT = "a red cat on a mat"
# Each kind of text encoder. BK-SDM's UNet has every kind of SD 1.5's blocks but the middle one, which SDXL's has too.
PAINTED = ("bk-sdm-tiny", *(pytest.param(name, marks=pytest.mark.deep) for name in ("sd15", "sd21")))


@pytest.mark.parametrize("name", models())
def test_parameter_counts(name: str) -> None:
    model = models()[name]
    with torch.device("meta"):
        module = build(model, "full")
    assert sum(parameter.numel() for parameter in module.parameters()) == model.parameters
    if model.published_parameters is not None:
        assert model.published_in
        assert abs(model.parameters / model.published_parameters - 1) <= ROUNDING


@pytest.mark.parametrize("name", models())
def test_the_tiny_scale_keeps_the_topology(name: str) -> None:
    with torch.device("meta"):
        full, tiny = (build(models()[name], scale).state_dict() for scale in ("full", "tiny"))
    assert full.keys() == tiny.keys()
    assert sum(t.numel() for t in tiny.values()) < 0.1 * sum(t.numel() for t in full.values())


def test_presets_are_of_models_that_there_are() -> None:
    presets = [read_preset(name) for name in preset_names()]
    used = {name for preset in presets for name in (*preset.models.values(), *preset.added.values())}
    assert used == set(models())
    with pytest.raises(ArgumentError, match="--preset: no such preset, got 'sd9', expected one of bk-sdm-base, "):
        read_preset("sd9")


def test_the_tokenizer_has_as_many_tokens_as_the_text_encoder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", 49408, 77)
    tokenizer = load_clip_tokenizer(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408
    ids = tokenizer(PROMPT).input_ids
    assert (ids[0], ids[-1]) == (49406, 49407)
    assert tokenizer.decode(ids[1:-1]).strip() == PROMPT


def test_the_same_weights_every_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_checkpoint(read_preset("sdxs-512-dreamshaper"), tmp_path / folder, "tiny")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert files
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_further_models_lie_beside_the_checkpoint_and_fit_it(tmp_path: Path) -> None:
    preset = read_preset("hybrid-sd")
    added = write_checkpoint(preset, tmp_path, "tiny")
    assert added.keys() == preset.added.keys()
    sources = read_sources(
        PresetPlan("hybrid-sd", tmp_path / "out", "tiny").export_plan(tmp_path / "checkpoint", added)
    )
    small, large = sources.denoisers["unet_small"].part.weights, sources.main.denoiser.weights
    assert small.shapes["down_blocks.0.resnets.0.conv1.weight"][0] == 32
    assert large.shapes["down_blocks.0.resnets.0.conv1.weight"][0] == 40
    assert set(sources.decoders) == {"vae_decoder_small", "vae_decoder_tiny"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAINTED)
def test_a_preset_exports_and_paints_diffusers_picture(name: str, tmp_path: Path, true_depth: bool) -> None:
    preset = read_preset(name)
    with at_depth(true_depth):
        added = write_checkpoint(preset, tmp_path, "tiny")
    bundle = export_bundle(PresetPlan(name, tmp_path / "bundle", "tiny").export_plan(tmp_path / "checkpoint", added))
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    steps = min(preset.num_inference_steps, 4)
    shared = {"num_inference_steps": steps, "guidance_scale": preset.guidance_scale, "height": 128, "width": 128}
    expected = reference(PROMPT, generator=torch.Generator().manual_seed(7), output_type="np", **shared).images
    with Pipeline.open(bundle) as pipe:
        assert pipe.bundle.manifest.defaults.num_inference_steps == preset.num_inference_steps
        assert pipe.bundle.manifest.defaults.guidance_scale == preset.guidance_scale
        assert {"unet", *preset.added} <= set(pipe.bundle.manifest.components)
        actual = np.stack(pipe(PROMPT, seed=7, output_type="np", **shared).images)
        assert actual.std() > 1e-3
        assert psnr_db(actual, expected) >= 45
        if true_depth:
            require_engines(pipe.bundle, tmp_path / "cache", ("text_encoder", "unet"))
