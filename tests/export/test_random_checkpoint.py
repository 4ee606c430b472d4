"""Random-weight checkpoints: diffusers loads them from their authors' layout and paints, at every family's topology."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tandemrt.export.presets import SCALES, Preset, Scale, models, preset_names, read_preset
from tandemrt.export.random_checkpoint import build, write_checkpoint
from tandemrt.export.random_tokenizer import write_t5_tokenizer
from tandemrt.export.random_weights import write_weights

PROMPT = "a red cat on a mat"
OTHER_PROMPT = "two blue houses by the sea"
SIZE = 64
# What diffusers wants to be told where the index leaves it out.
LEFT_OUT = {"sd3-medium-no-t5": {"text_encoder_3": None, "tokenizer_3": None}}
# SDXL and SD3 themselves paint in test_sdxl and test_sd3.
PAINTED = (
    "lcm-sd1",
    *(
        pytest.param(name, marks=pytest.mark.deep)
        for name in ("sdxl", "ssd-1b", "sdxs-1024", "hyper-sdxl-1step", "sd3-medium", "sd3-medium-no-t5")
    ),
)
CONTROLLED = {
    "sd15-controlnet": StableDiffusionControlNetPipeline,
    "sdxs-512-sketch": StableDiffusionControlNetPipeline,
    "sdxl-controlnet": StableDiffusionXLControlNetPipeline,
}


def paint(pipe: DiffusionPipeline, preset: Preset, prompt: str, **inputs: Any) -> np.ndarray[Any, Any]:
    """At most two steps, (SIZE, SIZE, 3) in 0..1."""
    pipe.set_progress_bar_config(disable=True)
    # The last step of a schedule hardly changes a picture, so that one alone would show nothing of the inputs.
    steps = {"num_inference_steps": min(preset.num_inference_steps, 2)}
    schedule = steps if preset.timesteps is None else {"timesteps": list(preset.timesteps)}
    if preset.pipeline == "StableDiffusion3Pipeline":
        schedule["max_sequence_length"] = 16
    return pipe(
        prompt,
        guidance_scale=preset.guidance_scale,
        height=SIZE,
        width=SIZE,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **schedule,
        **inputs,
    ).images[0]


def require_picture(picture: np.ndarray[Any, Any]) -> None:
    """Finite, of many values, most of them neither black nor white."""
    assert np.isfinite(picture).all()
    assert picture.std() > 1e-2
    assert np.mean((picture > 0) & (picture < 1)) > 0.5


@pytest.mark.parametrize("name", PAINTED)
def test_diffusers_loads_and_paints(name: str, tmp_path: Path) -> None:
    preset = read_preset(name)
    write_checkpoint(preset, tmp_path, "tiny")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32, **LEFT_OUT.get(name, {}))
    assert type(pipe).__name__ == preset.pipeline
    first, other = (paint(pipe, preset, prompt) for prompt in (PROMPT, OTHER_PROMPT))
    require_picture(first)
    assert np.abs(first - other).max() > 1e-2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.deep) if "sdxl" in name else name for name in CONTROLLED]
)
def test_diffusers_loads_and_obeys_the_controlnet(name: str, tmp_path: Path) -> None:
    preset = read_preset(name)
    (folder,) = write_checkpoint(preset, tmp_path, "tiny").values()
    controlnet = ControlNetModel.from_pretrained(folder, dtype=torch.float32)
    pipe = CONTROLLED[name].from_pretrained(tmp_path / "checkpoint", controlnet=controlnet, dtype=torch.float32)
    values = np.random.default_rng(7).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    first, other = (paint(pipe, preset, PROMPT, image=Image.fromarray(pixels)) for pixels in (values, 255 - values))
    require_picture(first)
    assert np.abs(first - other).max() > 1e-2


def test_hybrid_denoisers_and_decoders_load_by_themselves(tmp_path: Path) -> None:
    added = write_checkpoint(read_preset("hybrid-sdxl"), tmp_path, "tiny")
    assert added.keys() == {"unet_small", "vae_decoder_small", "vae_decoder_tiny"}
    small = UNet2DConditionModel.from_pretrained(added["unet_small"])
    large = UNet2DConditionModel.from_pretrained(tmp_path / "checkpoint" / "unet")
    assert small.config.cross_attention_dim == large.config.cross_attention_dim == 256
    assert small.num_parameters() < 0.4 * large.num_parameters()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "sdxl",
            {
                "_class_name": "StableDiffusionXLPipeline",
                "force_zeros_for_empty_prompt": True,
                "scheduler": ["diffusers", "EulerDiscreteScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
        ),
        (
            "sd3-medium",
            {
                "_class_name": "StableDiffusion3Pipeline",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "text_encoder_3": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "tokenizer_3": ["transformers", "T5TokenizerFast"],
                "transformer": ["diffusers", "SD3Transformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
        ),
    ],
)
def test_the_layout_is_the_authors(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(read_preset(name), tmp_path, "tiny")
    main = tmp_path / "checkpoint"
    assert json.loads((main / "model_index.json").read_text()) == expected
    assert {path.name for path in main.iterdir() if path.is_dir()} == {key for key in expected if key[0] not in "_f"}


def test_tensors_have_their_published_names(tmp_path: Path) -> None:
    write_checkpoint(read_preset("sd3-medium"), tmp_path, "tiny")
    main = tmp_path / "checkpoint"
    with safe_open(main / "text_encoder_2" / "model.safetensors", "pt") as clip:
        assert {name.partition(".")[0] for name in clip.keys()} == {"text_model", "text_projection"}  # noqa: SIM118
        assert clip.get_slice("text_projection.weight").get_dtype() == "F16"
    index = json.loads((main / "text_encoder_3" / "model.safetensors.index.json").read_text())
    names = index["weight_map"]
    assert {name.partition(".")[0] for name in names} == {"shared", "encoder"}
    assert "encoder.embed_tokens.weight" not in names
    assert set(names.values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    sizes = [sum(t.nbytes for t in load_file(main / "text_encoder_3" / file).values()) for file in set(names.values())]
    assert (
        sum(sizes)
        == index["metadata"]["total_size"]
        == 2 * T5EncoderModel.from_pretrained(main / "text_encoder_3").num_parameters()
    )
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_tensor_depends_on_its_name_and_the_seed_alone(tmp_path: Path) -> None:
    one, other = nn.Sequential(), nn.Sequential()
    one.add_module("a", nn.Linear(64, 64))
    one.add_module("b", nn.Linear(64, 64))
    other.add_module("b", nn.Linear(64, 64))
    for file, module, seed in (("one", one, "x"), ("other", other, "x"), ("reseeded", other, "y")):
        write_weights(module, tmp_path / file, seed)
    tensors = {file: load_file(tmp_path / file) for file in ("one", "other", "reseeded")}
    assert torch.equal(tensors["one"]["b.weight"], tensors["other"]["b.weight"])
    assert not torch.equal(tensors["one"]["a.weight"], tensors["one"]["b.weight"])
    assert not torch.equal(tensors["other"]["b.weight"], tensors["reseeded"]["b.weight"])
    assert abs(float(tensors["one"]["a.weight"].std()) * 64**0.5 - 1) < 0.05


def test_position_embeddings_are_the_class_s_own(tmp_path: Path) -> None:
    model = models()["transformer-sd3-medium"]
    with torch.device("meta"):
        empty = build(model, "tiny")
    write_weights(empty, tmp_path / "model.safetensors", "any")
    written = load_file(tmp_path / "model.safetensors")["pos_embed.pos_embed"]
    own = SD3Transformer2DModel.from_config({**model.scaled("tiny"), "num_layers": 1}).pos_embed.pos_embed
    assert torch.equal(written, own.half())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", preset_names())
def test_the_models_of_a_preset_fit_each_other(name: str, scale: Scale) -> None:
    preset = read_preset(name)
    config = {part: models()[model].scaled(scale) for part, model in (preset.models | preset.added).items()}
    clips = [config[part] for part in ("text_encoder", "text_encoder_2") if part in config]
    text_width = sum(clip["hidden_size"] for clip in clips)
    pooled_width = {
        "StableDiffusionXLPipeline": clips[-1]["projection_dim"],
        "StableDiffusion3Pipeline": sum(clip["projection_dim"] for clip in clips),
    }.get(preset.pipeline, 0)
    channels = config["vae"]["latent_channels"]
    for part, each in config.items():
        if part.startswith("vae"):
            assert each["latent_channels"] == channels
        elif part == "transformer":
            assert each["in_channels"] == channels
            assert each["pooled_projection_dim"] == pooled_width
            assert each["caption_projection_dim"] == each["num_attention_heads"] * each["attention_head_dim"]
            assert each["joint_attention_dim"] == models()["t5-xxl"].scaled(scale)["d_model"] > text_width
        elif not part.startswith("text_encoder"):
            assert each["in_channels"] == channels
            assert each["cross_attention_dim"] == text_width
            time_ids = 6 * each.get("addition_time_embed_dim", 0)
            assert each.get("projection_class_embeddings_input_dim", 0) == pooled_width + time_ids


def test_tokenizers_pad_as_their_text_encoders_learnt_it(tmp_path: Path) -> None:
    write_checkpoint(read_preset("sd3-medium"), tmp_path, "tiny")
    main = tmp_path / "checkpoint"
    for folder, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        ids = CLIPTokenizer.from_pretrained(main / folder)(PROMPT, padding="max_length").input_ids
        assert len(ids) == 77
        assert ids[ids.index(49407) + 1 :] == [pad] * (76 - ids.index(49407))


def test_the_t5_tokenizer_reads_from_its_folder_alone(tmp_path: Path) -> None:
    write_t5_tokenizer(tmp_path / "tokenizer_3")
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer_3" / "tokenizer.json"))
    assert alone.get_vocab_size() == 32_100
    named = ("<pad>", "</s>", "<unk>", "<extra_id_99>", "<extra_id_0>")
    assert [alone.token_to_id(token) for token in named] == [0, 1, 2, 32_000, 32_099]
    for load in (AutoTokenizer, T5TokenizerFast):
        tokenizer = load.from_pretrained(tmp_path / "tokenizer_3")
        assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (32_100, 512, 0)
        for text in (PROMPT, "A Red CAT, naïve & 42 cats'", "  two   spaces\n", "", "日本語 cat", "<extra_id_7> x</s>"):
            assert tokenizer(text).input_ids == alone.encode(text).ids
        padded = tokenizer(PROMPT, padding="max_length", max_length=16, truncation=True).input_ids
        end = padded.index(1)
        assert padded[end:] == [1] + [0] * (15 - end)
        assert tokenizer.decode(padded[:end]) == PROMPT
        assert 2 in tokenizer("日本語").input_ids
