"""Checkpoints on disk and whether their models fit together: what is refused, and in which words."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tandemrt.export.agreement import latent_space, prediction_type
from tandemrt.export.autoencoders import decoder_graph
from tandemrt.export.bundle import export_bundle
from tandemrt.export.checkpoint import read_autoencoder, read_checkpoint, read_denoiser
from tandemrt.export.conditioning import text_conditioning
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.lazy import run
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.samples import _noise_levels
from tandemrt.export.sources import read_sources
from tandemrt.export.text_encoders import text_encoder_graph
from tandemrt.export.weights import parameters
from tandemrt.runtime.errors import ArgumentError, CheckpointError
from tandemrt.runtime.manifest import SchedulerDefaults

from .mini import TEXT_WIDTH, UNET_FILE, edit_json, edit_tensors, kl_vae, loaded, tiny_vae, unet

Damage = Callable[[Path], object]

DAMAGES: dict[str, tuple[Damage, str]] = {
    "no index": (lambda c: (c / "model_index.json").unlink(), "not a checkpoint, expected a diffusers directory"),
    "index is no JSON": (lambda c: (c / "model_index.json").write_text("{"), r"model_index\.json: not JSON"),
    "other pipeline": (
        lambda c: edit_json(c / "model_index.json", _class_name="FluxPipeline"),
        "got 'FluxPipeline', expected StableDiffusionPipeline",
    ),
    "code of its own": (
        lambda c: edit_json(c / "model_index.json", unet=["my_unet", "MyUNet"]),
        "unet: library, got 'my_unet', expected diffusers",
    ),
    "class of another kind": (
        lambda c: edit_json(c / "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"]),
        "got 'AsymmetricAutoencoderKL', expected AutoencoderKL or AutoencoderTiny",
    ),
    "further component": (
        lambda c: edit_json(c / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        "component that is not supported, got 'text_encoder_2'",
    ),
    "empty entry": (
        lambda c: edit_json(c / "model_index.json", unet=[]),
        r"unet: entry, got \[\], expected a library and a class",
    ),
    "entry of three": (
        lambda c: edit_json(c / "model_index.json", scheduler=["diffusers", "DDIMScheduler", "x"]),
        "scheduler: entry, got .*'x'",
    ),
    "scheduler that is none": (
        lambda c: edit_json(c / "model_index.json", scheduler=["diffusers", "os.system"]),
        r"scheduler: class, got 'os\.system'",
    ),
    "missing folder": (lambda c: shutil.rmtree(c / "unet"), "missing component unet"),
    "missing config": (lambda c: (c / "vae" / "config.json").unlink(), r"vae: no vae here, expected config\.json"),
    "missing weights": (lambda c: (c / "unet" / UNET_FILE).unlink(), "no weights"),
    "config of another class": (
        lambda c: edit_json(c / "unet" / "config.json", _class_name="UNet2DModel"),
        "got 'UNet2DModel', expected UNet2DConditionModel",
    ),
    "infinite scheduler value": (
        lambda c: edit_json(c / "scheduler" / "scheduler_config.json", beta_end=float("inf")),
        "beta_end: scheduler value, got inf",
    ),
    "SDXL conditioning": (
        lambda c: edit_json(
            c / "unet" / "config.json",
            addition_embed_type="text_time",
            addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=28,
        ),
        "unet: text conditioning: pooled width, got 16, expected 0, as the text encoders give",
    ),
    "UNet of other channels": (
        lambda c: edit_json(c / "unet" / "config.json", in_channels=8),
        "in_channels.*got 8, expected 4",
    ),
    "text of another width": (
        lambda c: edit_json(c / "unet" / "config.json", cross_attention_dim=768),
        f"text conditioning: width, got 768, expected what fits {TEXT_WIDTH} of text_encoder",
    ),
    "unknown prediction": (
        lambda c: edit_json(c / "scheduler" / "scheduler_config.json", prediction_type="score"),
        "prediction_type: kind, got 'score'",
    ),
    "null beta": (
        lambda c: edit_json(c / "scheduler" / "scheduler_config.json", beta_start=None),
        "scheduler: cannot be run .DDIMScheduler: beta_start: unsupported value, got None",
    ),
    "training steps that are no number": (
        lambda c: edit_json(c / "scheduler" / "scheduler_config.json", num_train_timesteps="x"),
        "DDIMScheduler: num_train_timesteps: unsupported value, got 'x'",
    ),
    "thresholding": (
        lambda c: edit_json(c / "scheduler" / "scheduler_config.json", thresholding=True),
        "DDIMScheduler: thresholding: unsupported value, got True, expected False",
    ),
    "scheduler of an unknown class": (
        lambda c: edit_json(c / "scheduler" / "scheduler_config.json", _class_name="KarrasVeScheduler"),
        "scheduler: cannot be run .*got 'KarrasVeScheduler', expected one of DDIMScheduler",
    ),
    "latent statistics": (
        lambda c: edit_json(c / "vae" / "config.json", latents_mean=[0, 0, 0, 0]),
        "per-channel latent statistics",
    ),
    "no tokenizer merges": (lambda c: (c / "tokenizer" / "merges.txt").unlink(), r"merges\.txt: missing"),
    "tokenizer without a padding token": (
        lambda c: edit_json(c / "tokenizer" / "tokenizer_config.json", pad_token=None),
        r"tokenizer_config\.json: pad_token, got None, expected a token",
    ),
    "broken tokenizer": (lambda c: (c / "tokenizer" / "vocab.json").write_text("[]"), "not a CLIP tokenizer"),
    "text encoder truncated": (
        lambda c: _cut(c / "text_encoder" / "model.safetensors"),
        r"model\.safetensors: truncated",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_leaves_nothing(
    damage: str, own_checkpoint: Path, tmp_path: Path
) -> None:
    break_it, complaint = DAMAGES[damage]
    break_it(own_checkpoint)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        export_bundle(ExportPlan(own_checkpoint, tmp_path / "out"))
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "no such checkpoint"),
        (lambda path: path.mkdir(), "not a checkpoint, expected a diffusers directory"),
        (lambda path: (path.mkdir(), (path / "tandem.json").touch()), "a bundle already"),
    ],
)
def test_what_is_no_directory_of_diffusers_is_told_apart(tmp_path: Path, make: Damage, complaint: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(tmp_path / "x")


def test_infinity_that_diffusers_writes_by_default_is_left_out(own_checkpoint: Path) -> None:
    edit_json(own_checkpoint / "scheduler" / "scheduler_config.json", lambda_min_clipped=float("-inf"))
    config = read_checkpoint(own_checkpoint).scheduler.config
    assert "lambda_min_clipped" not in config
    assert json.loads(json.dumps(config, allow_nan=False)) == config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("conv_in.bias"), r"missing weights: conv_in\.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "no place for: extra"),
        (
            lambda t: t.update({"conv_out.bias": torch.ones(7)}),
            r"weights of another shape: conv_out\.bias \(7,\) instead of \(4,\)",
        ),
        (lambda t: t["conv_in.bias"].fill_(float("nan")), r"NaN or infinite weights in conv_in\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(own_checkpoint: Path, change: Damage, complaint: str) -> None:
    edit_tensors(own_checkpoint / "unet" / UNET_FILE, change)
    with pytest.raises(CheckpointError, match=complaint):
        denoiser_graph(read_checkpoint(own_checkpoint).denoiser)


def test_a_configuration_that_builds_nothing_is_refused(own_checkpoint: Path) -> None:
    edit_json(own_checkpoint / "unet" / "config.json", down_block_types=["NoSuchBlock"] * 2)
    with pytest.raises(CheckpointError, match="UNet2DConditionModel cannot be built from it"):
        denoiser_graph(read_checkpoint(own_checkpoint).denoiser)


def test_names_of_older_libraries_are_understood(own_checkpoint: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            older = name
            for new, before in old.items():
                older = older.replace(f".{new}.", f".{before}.")
            tensors[older] = tensors.pop(name)

    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]

    checkpoint = read_checkpoint(own_checkpoint)
    before = loaded(decoder_graph(checkpoint.vae, latent_space(checkpoint.vae))).state_dict()
    edit_tensors(own_checkpoint / "vae" / UNET_FILE, rename)
    edit_tensors(own_checkpoint / "text_encoder" / "model.safetensors", prefix)
    checkpoint = read_checkpoint(own_checkpoint)
    after = loaded(decoder_graph(checkpoint.vae, latent_space(checkpoint.vae))).state_dict()
    assert any(".attentions." in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    encoding = text_conditioning(checkpoint).encoders["text_encoder"]
    assert text_encoder_graph(checkpoint.texts["text_encoder"].encoder, encoding).parameters > 0


def test_a_denoiser_is_found_in_a_pipeline_a_holder_and_its_own_folder(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint / "unet", tmp_path / "holder" / "unet")
    main, folders = read_checkpoint(checkpoint), (checkpoint, tmp_path / "holder", checkpoint / "unet")
    found = [read_denoiser(folder, main) for folder in folders]
    assert len({parameters(source.part.weights) for source in found}) == 1
    assert [source.scheduler is not None for source in found] == [True, False, False]
    assert read_autoencoder(checkpoint).folder == checkpoint / "vae"


SMALL_DAMAGES: dict[str, tuple[Damage, str]] = {
    "text width": (
        lambda s: edit_json(s / "unet" / "config.json", cross_attention_dim=20),
        "unet_small: cross_attention_dim: text conditioning width, got 20, expected 16 as in the main",
    ),
    "latent channels": (
        lambda s: edit_json(s / "unet" / "config.json", in_channels=16),
        "unet_small: in_channels: latent channels, got 16, expected 4",
    ),
    "prediction": (
        lambda s: edit_json(s / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"),
        "unet_small: prediction_type: prediction type, got 'v_prediction', expected 'epsilon'",
    ),
    "noise": (
        lambda s: edit_json(s / "scheduler" / "scheduler_config.json", beta_end=0.02),
        r"unet_small: beta_end: noise schedule, got 0\.02, expected 0\.012",
    ),
    "zero terminal SNR": (
        lambda s: edit_json(s / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True),
        "unet_small: rescale_betas_zero_snr: noise schedule, got True, expected False",
    ),
    "betas": (
        lambda s: edit_json(s / "scheduler" / "scheduler_config.json", trained_betas=[0.01] * 1000),
        "unet_small: trained_betas: noise schedule, got .*expected None",
    ),
    "a scheduler that cannot be run": (
        lambda s: edit_json(s / "scheduler" / "scheduler_config.json", thresholding=True),
        "unet_small: scheduler: cannot be run .DDIMScheduler: thresholding",
    ),
    "latent scale": (
        lambda s: edit_json(s / "vae" / "config.json", scaling_factor=0.13025),
        r"unet_small: scaling_factor: latent space, got 0\.13025, expected 0\.18215",
    ),
}


@pytest.mark.parametrize("damage", SMALL_DAMAGES)
def test_a_small_model_that_does_not_fit_is_refused_with_both_values(
    damage: str, checkpoint: Path, own_checkpoint: Path
) -> None:
    break_it, complaint = SMALL_DAMAGES[damage]
    break_it(own_checkpoint)
    with pytest.raises(CheckpointError, match=complaint):
        read_sources(ExportPlan(checkpoint, checkpoint, (Added("unet_small", own_checkpoint),)))


def test_a_schedule_left_to_a_class_is_the_schedule_of_that_class(checkpoint: Path, own_checkpoint: Path) -> None:
    config = {"_class_name": "LCMScheduler"}
    (own_checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    sources = read_sources(ExportPlan(checkpoint, checkpoint, (Added("unet_small", own_checkpoint),)))
    assert sources.denoisers["unet_small"].scheduler == SchedulerDefaults(class_name="LCMScheduler", config={})


def test_samples_are_as_noisy_as_in_training() -> None:
    config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500}
    expected = DDIMScheduler(**config).alphas_cumprod.numpy()
    scheduler = SchedulerDefaults(class_name="DDIMScheduler", config={**config, "clip_sample": False})
    kept, noise = _noise_levels(scheduler)
    np.testing.assert_allclose(kept**2, expected, rtol=1e-5)
    np.testing.assert_allclose(kept**2 + noise**2, 1)
    kept, noise = _noise_levels(SchedulerDefaults(class_name="FlowMatchEulerDiscreteScheduler", config={}))
    assert (kept[0], noise[0], kept[-1], noise[-1]) == (1, 0, 0, 1)
    assert np.all(np.diff(kept) < 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"latent_channels": 16}, "vae_decoder_other: latent_channels: latent space, got 16, expected 4"),
        (
            {"scaling_factor": 0.13025},
            r"vae_decoder_other: scaling_factor: latent space, got 0\.13025",
        ),
        ({"scaling_factor": 10**400}, r"config\.json: scaling_factor and shift_factor"),
        ({"block_out_channels": [8, 8, 8]}, "vae_decoder_other: downsampling: latent space, got 4, expected 2"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    kl_vae().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=complaint):
        read_sources(ExportPlan(checkpoint, checkpoint, (Added("vae_decoder_other", tmp_path),)))


def test_a_tiny_decoder_reads_the_latents_of_the_bundle(checkpoint: Path, tiny: Path) -> None:
    """It is fed latent / scaling_factor as every decoder is, and must see the latent as its own pipeline feeds it."""
    main = latent_space(read_checkpoint(checkpoint).vae)
    graph = decoder_graph(read_autoencoder(tiny), main)
    latent = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    stock = tiny_vae().from_pretrained(tiny)
    with torch.inference_mode():
        expected = stock.decode(latent / stock.config.scaling_factor).sample
    assert torch.allclose(run(graph.module, latent / main.scaling_factor), expected, atol=1e-5)


def test_pruned_widths_come_from_the_tensors(own_checkpoint: Path) -> None:
    narrow = unet()
    block = narrow.down_blocks[1].resnets[0]
    shapes = {"down_blocks.1.resnets.0.conv1.weight": (block.conv1.out_channels // 2,)}
    from tandemrt.export.pruned import resize_inner_widths  # noqa: PLC0415

    resize_inner_widths(narrow, shapes)
    narrow.save_pretrained(own_checkpoint / "unet")
    graph = denoiser_graph(read_checkpoint(own_checkpoint).denoiser)
    assert graph.parameters == sum(weight.numel() for weight in narrow.parameters())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def taking(checkpoint: Path, **options: Any) -> ExportPlan:
    return ExportPlan(checkpoint, checkpoint.parent / "out", **options)


def test_a_denoiser_in_the_checkpoints_place_brings_its_scheduler(checkpoint: Path, own_checkpoint: Path) -> None:
    edit_json(own_checkpoint / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    sources = read_sources(taking(checkpoint, denoiser=own_checkpoint))
    assert sources.main.denoiser.folder == own_checkpoint / "unet"
    assert sources.main.vae.folder == checkpoint / "vae"
    assert prediction_type(sources.main.scheduler) == "v_prediction"
    solver = read_sources(taking(checkpoint, denoiser=own_checkpoint, solver="lcm")).main.scheduler
    assert (solver.class_name, prediction_type(solver)) == ("LCMScheduler", "v_prediction")
    assert (
        prediction_type(read_sources(taking(checkpoint, denoiser=own_checkpoint / "unet")).main.scheduler) == "epsilon"
    )


@pytest.mark.parametrize("option", ["denoiser", "vae"])
def test_a_model_of_another_latent_space_does_not_take_the_checkpoints_place(
    option: str, checkpoint: Path, own_checkpoint: Path
) -> None:
    edit_json(own_checkpoint / "vae" / "config.json", scaling_factor=0.13025)
    with pytest.raises(CheckpointError, match=f"--{option}: scaling_factor: latent space, got 0.13025"):
        read_sources(taking(checkpoint, **{option: own_checkpoint}))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"eta": math.nan}, "eta: cannot be used, got nan"),
        ({"eta": -3.0}, "eta: cannot be used"),
        ({"eta": 0.5, "solver": "euler"}, "eta: EulerDiscreteScheduler has none"),
        ({"timesteps": (5, 800), "solver": "lcm"}, "timesteps: cannot be used"),
        ({"timesteps": (), "solver": "lcm"}, "num_inference_steps"),
        ({"timesteps": (800,)}, "DDIMScheduler takes no explicit time steps"),
        ({"solver": "magic"}, "solver: unknown, got 'magic'"),
        (
            {"added": (Added("transformer_small", Path("t")),)},
            "name of a denoiser, got 'transformer_small'",
        ),
    ],
)
def test_defaults_that_cannot_be_used_are_refused_before_the_export(
    options: dict[str, Any], complaint: str, checkpoint: Path
) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        read_sources(taking(checkpoint, **options))
