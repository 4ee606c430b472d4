"""Checkpoints of random weights in their authors' layout, for architectures whose weights are not at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from .checkpoint import tokenizer_of
from .graph import quiet
from .presets import Model, Preset, Scale, models
from .pruned import autoencoder_kl_from_config, pruned_shapes, resize_inner_widths
from .random_tokenizer import write_json, write_t5_tokenizer, write_tokenizer
from .random_weights import write_weights

_ABSENT = [None, None]
# What an index says besides the folders that are there.
_INDEX: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"feature_extractor": _ABSENT, "safety_checker": _ABSENT},
    "LatentConsistencyModelPipeline": {"feature_extractor": _ABSENT, "safety_checker": _ABSENT},
    "StableDiffusionXLPipeline": {"force_zeros_for_empty_prompt": True},
    "StableDiffusion3Pipeline": {"text_encoder_3": _ABSENT, "tokenizer_3": _ABSENT},
}
# Published in parts: files of the hub held 5 GB.
_SHARDS = {"T5EncoderModel": 2}


def write_checkpoint(preset: Preset, folder: Path, scale: Scale) -> dict[str, Path]:
    """Write a preset's models with random fp16 weights: the pipeline to `folder / "checkpoint"`, the others beside it.

    The weights are the same every time; no more than one tensor is in memory. Returns the folders of the further models
    by component.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    main = folder / "checkpoint"
    index: dict[str, Any] = {"_class_name": preset.pipeline, **_INDEX[preset.pipeline]}
    for part, name in preset.models.items():
        _write_model(name, scale, main / part)
        class_name = models()[name].class_name
        if part.startswith("text_encoder"):
            tokenizer = tokenizer_of(part)
            index[tokenizer] = ["transformers", _write_tokenizer(models()[name], main / tokenizer)]
            index[part] = ["transformers", class_name]
        else:
            index[part] = ["diffusers", class_name]
    added = {component: folder / component for component in preset.added}
    for component, name in preset.added.items():
        _write_model(name, scale, added[component])
    index["scheduler"] = ["diffusers", preset.scheduler.class_name]
    scheduler = {"_class_name": preset.scheduler.class_name, **preset.scheduler.config}
    (main / "scheduler").mkdir()
    write_json(main / "scheduler" / "scheduler_config.json", scheduler)
    write_json(main / "model_index.json", index)
    return added


def build(model: Model, scale: Scale) -> nn.Module:
    """The architecture as a torch module with its class's initial weights."""
    return _BUILDERS[model.class_name](model.scaled(scale))


def _write_model(name: str, scale: Scale, folder: Path) -> None:
    model = models()[name]
    with quiet(), torch.device("meta"):
        module = build(model, scale)
    folder.mkdir(parents=True)
    if isinstance(module, PreTrainedModel):
        stem = "model"
        config = {**module.config.to_diff_dict(), "architectures": [model.class_name]}
        write_json(folder / "config.json", config)
    else:
        stem = "diffusion_pytorch_model"
        module.save_config(folder)
    write_weights(module, folder / f"{stem}.safetensors", name, _SHARDS.get(model.class_name, 1))


def _write_tokenizer(encoder: Model, folder: Path) -> str:
    """Write the tokenizer that belongs to a text encoder and return its class's name."""
    if encoder.class_name == "T5EncoderModel":
        write_t5_tokenizer(folder)
        return "T5TokenizerFast"
    config = encoder.config
    write_tokenizer(folder, config["vocab_size"], config["max_position_embeddings"], str(encoder.pad_token))
    return "CLIPTokenizer"


def _unet(config: Mapping[str, Any]) -> nn.Module:
    unet = UNet2DConditionModel.from_config(dict(config))
    pruning = {key: value for key, value in config.items() if key.startswith("block_") and key != "block_out_channels"}
    if pruning:
        resize_inner_widths(unet, pruned_shapes(unet, pruning))
        unet.register_to_config(**pruning)
    return unet


# Written out by class, so that a configuration can name no other code.
_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": autoencoder_kl_from_config,
    "AutoencoderTiny": lambda config: AutoencoderTiny.from_config(dict(config)),
    "ControlNetModel": lambda config: ControlNetModel.from_config(dict(config)),
    "SD3Transformer2DModel": lambda config: SD3Transformer2DModel.from_config(dict(config)),
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "T5EncoderModel": lambda config: T5EncoderModel(T5Config(**config)),
}
