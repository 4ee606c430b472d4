"""Checkpoints of random weights in their authors' layout, for architectures whose weights are not at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from .graph import quiet
from .presets import Model, Preset, Scale, models
from .pruned import autoencoder_kl_from_config, pruned_shapes, resize_inner_widths

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def write_checkpoint(preset: Preset, folder: Path, scale: Scale) -> dict[str, Path]:
    """Write a preset's models with random fp16 weights: the pipeline to `folder / "checkpoint"`, the others beside it.

    The weights are the same every time. Returns the folders of the further denoisers and decoders by component.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    torch.manual_seed(0)
    main = folder / "checkpoint"
    for part, name in preset.models.items():
        _write_model(name, scale, main / part)
    added = {component: folder / component for component in preset.added}
    for component, name in preset.added.items():
        _write_model(name, scale, added[component])
    text = models()[preset.models["text_encoder"]].config
    write_tokenizer(main / "tokenizer", text["vocab_size"], text["max_position_embeddings"])
    scheduler = {"_class_name": preset.scheduler.class_name, **preset.scheduler.config}
    (main / "scheduler").mkdir()
    _write_json(main / "scheduler" / "scheduler_config.json", scheduler)
    classes = {part: models()[name].class_name for part, name in preset.models.items()}
    _write_json(
        main / "model_index.json",
        {
            "_class_name": preset.pipeline,
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "scheduler": ["diffusers", preset.scheduler.class_name],
            "text_encoder": ["transformers", classes["text_encoder"]],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", classes["unet"]],
            "vae": ["diffusers", classes["vae"]],
        },
    )
    return added


def build(model: Model, scale: Scale) -> nn.Module:
    """The architecture as a torch module with its class's initial weights."""
    return _BUILDERS[model.class_name](model.scaled(scale))


def write_tokenizer(folder: Path, size: int, length: int) -> None:
    """Write a byte-pair encoding of `size` tokens in CLIP's files; its merges are of letters, in alphabetical order."""
    alphabet = sorted(ByteLevel.alphabet())
    single = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    letters = ascii_lowercase + digits
    ends = [*letters, *(letter + "</w>" for letter in letters)]
    pairs = product(letters, ends)
    triples = ((first + second, last) for first, second, last in product(letters, letters, ends))
    merges = list(islice(chain(pairs, triples), size - len(single) - 2))
    tokens = [*single, *map("".join, merges), _BOS, _EOS]
    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _EOS, "pad_token": _EOS}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_model(name: str, scale: Scale, folder: Path) -> None:
    """One model at a time, so that only the largest has to fit into memory."""
    model = models()[name]
    with quiet():
        module = build(model, scale).half()
        if isinstance(module, CLIPTextModel):
            _save_text_encoder(module, folder)
        else:
            module.save_pretrained(folder, max_shard_size="100GB")


def _save_text_encoder(model: CLIPTextModel, folder: Path) -> None:
    """Under the names that published checkpoints have; transformers from 5 on writes them without the prefix."""
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): tensor.contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", {**model.config.to_diff_dict(), "architectures": [type(model).__name__]})


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
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
