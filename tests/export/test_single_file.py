"""Single files in their authors' layout: every tensor is the one that diffusers finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from diffusers.loaders import single_file_utils as oracle

from tandemrt.export import single_file
from tandemrt.export.bundle import export_bundle
from tandemrt.export.checkpoint import read_checkpoint
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.presets import models, read_preset
from tandemrt.export.remapped import Origin
from tandemrt.export.single_file import read_single_file
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.manifest_files import MANIFEST_NAME, decode

from .original import State, config_of, original
from .single_files import PRESETS, parts, tokenizers, write

pytestmark = pytest.mark.usefixtures("small")

TRAINING = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.ones(1),
    "alphas_cumprod": torch.ones(1000),
    "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
    "posterior_mean_coef1": torch.ones(1000),
    "betas": torch.ones(1000),
    "denoiser.sigmas": torch.ones(1000),
    "cond_stage_model.text_projection": torch.ones(2, 2),
    "cond_stage_model.logit_scale": torch.ones(()),
}


def converted(preset: str, file: State) -> dict[str, State]:
    """What diffusers' own converters make of a file, by component; they take the dictionaries apart that they get."""
    found: dict[str, State] = {"vae": oracle.convert_ldm_vae_checkpoint(dict(file), config_of(preset, "vae"))}
    for component, name in read_preset(preset).models.items():
        if component == "unet":
            found[component] = oracle.convert_ldm_unet_checkpoint(dict(file), config_of(preset, component))
        elif component == "transformer":
            own = {key: tensor for key, tensor in file.items() if key.startswith("model.diffusion_model.")}
            found[component] = oracle.convert_sd3_transformer_checkpoint_to_diffusers(own)
        elif name == "t5-xxl":
            found[component] = oracle.convert_sd3_t5_checkpoint_to_diffusers(dict(file))
        elif name.startswith("openclip") and not preset.startswith("sd3"):
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=config_of(preset, component)["hidden_size"]))
            prefix = "cond_stage_model.model." if component == "text_encoder" else "conditioner.embedders.1.model."
            found[component] = oracle.convert_open_clip_checkpoint(model, dict(file), prefix)
        elif component != "vae":
            which = "clip_l" if component == "text_encoder" else "clip_g"
            found[component] = oracle.convert_ldm_clip_checkpoint(dict(file), f"text_encoders.{which}.transformer.")
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_is_the_one_that_diffusers_finds(
    preset: str, states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file = original(preset, states(preset))
    path = write(tmp_path, {**file, **TRAINING})
    checkpoint = read_single_file(path, tokenizers(tmp_path / "pipeline", preset), "v_prediction")
    assert checkpoint.scheduler == read_preset(preset).scheduler
    assert checkpoint.zero_negative == (read_preset(preset).pipeline == "StableDiffusionXLPipeline")
    expected = converted(preset, file)
    own = parts(checkpoint)
    assert own.keys() == expected.keys() == states(preset).keys()
    for component, part in own.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in expected[component].items()}
        assert part.weights.shapes == shapes, component
        assert _bare(part.weights.shapes) == _bare(states(preset)[component])
        for name, tensor in expected[component].items():
            assert torch.equal(part.weights.load(name), tensor), f"{component}: {name}"


def _bare(names: Iterable[str]) -> set[str]:
    """Without what versions of transformers add or leave out."""
    return {name.removeprefix("text_model.") for name in names} - {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize(("kind", "size"), [("epsilon", 8), ("v_prediction", 12)])
def test_what_stable_diffusion_2_predicts_is_asked_for(
    kind: str, size: int, states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    path, folder = write(tmp_path, original("sd21", states("sd21"))), tokenizers(tmp_path / "pipeline", "sd21")
    checkpoint = read_single_file(path, folder, kind)
    assert checkpoint.scheduler.config.get("prediction_type", "epsilon") == kind
    assert checkpoint.denoiser.config["sample_size"] == size
    for unknown in (None, "sample"):
        with pytest.raises(
            ArgumentError,
            match=rf"prediction_type: cannot be told from the tensors of .*, got {unknown!r}, expected epsilon or "
            r"v_prediction\. Give --solver-config prediction_type=epsilon",
        ):
            read_single_file(path, folder, unknown)


def test_a_projection_that_sd3_leaves_out_is_the_identity(
    states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file = original("sd3-medium-no-t5", states("sd3-medium-no-t5"))
    del file["text_encoders.clip_l.transformer.text_projection.weight"]
    checkpoint = read_single_file(write(tmp_path, file), tokenizers(tmp_path / "pipeline", "sd3-medium-no-t5"), None)
    weights = checkpoint.texts["text_encoder"].encoder.weights
    assert weights.shapes["text_projection.weight"] == (96, 96)
    assert torch.equal(weights.load("text_projection.weight"), torch.eye(96))


def test_what_does_not_divide_into_blocks_keeps_its_shape() -> None:
    fused = Origin("qkv", block=1, blocks=3)
    assert fused.shape((6, 5)) == (2, 5)
    assert torch.equal(fused.tensor(torch.arange(6)), torch.tensor([2, 3]))
    assert fused.shape((7, 5)) == (7, 5)
    assert fused.tensor(torch.ones(7, 5)).shape == (7, 5)
    assert fused.shape(()) == ()


def test_only_convolutions_of_one_pixel_are_flattened() -> None:
    flat = Origin("q", "flattened")
    for shape, expected in (((4, 4, 1, 1), (4, 4)), ((4, 4), (4, 4)), ((4, 4, 3, 3), (4, 4, 3, 3)), ((4,), (4,))):
        assert flat.shape(shape) == tuple(flat.tensor(torch.ones(shape)).shape) == expected


@pytest.mark.slow
def test_a_bundle_of_one_file_is_the_bundle_of_its_directory(
    checkpoint: Path, tiny: Path, half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"unet": "unet-sd1", "vae": "vae-kl", "text_encoder": "clip-l"}
    directory = read_checkpoint(checkpoint)
    loaded = {
        name: {key: part.weights.load(key).float() for key in part.weights.shapes}
        for name, part in parts(directory).items()
    }
    mini = {
        names[name]: msgspec.structs.replace(models()[names[name]], config=dict(part.config), pad_token=None)
        for name, part in parts(directory).items()
    }
    monkeypatch.setattr(single_file, "models", lambda: mini)
    preset = msgspec.structs.replace(read_preset("sd15"), scheduler=directory.scheduler)
    monkeypatch.setattr(single_file, "read_preset", lambda name: preset)
    path = write(tmp_path, original("sd15", loaded, mini))
    added, tokenizer = (Added("vae_decoder_tiny", tiny),), checkpoint / "tokenizer"
    one = export_bundle(ExportPlan(path, tmp_path / "one", added, dtype="fp16", tokenizer=tokenizer))
    digests = [
        {name: record.sha256 for name, record in decode((bundle / MANIFEST_NAME).read_bytes(), "").files.items()}
        for bundle in (one, half_bundle)
    ]
    assert digests[0] == digests[1]
