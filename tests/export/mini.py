"""A complete diffusers checkpoint of random weights, small enough to export in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tandemrt.bench.shapes.bundle import WEIGHTS
from tandemrt.export.modules import Graph

TOKENIZER = WEIGHTS / "large" / "tokenizer"
UNET_FILE = "diffusion_pytorch_model.safetensors"
TEXT_WIDTH, TEXT_LENGTH, SCALING = 16, 24, 0.18215


def write_checkpoint(folder: Path) -> Path:
    """A pipeline directory: UNet of two levels, text encoder of one layer, KL autoencoder with factor 2."""
    torch.manual_seed(0)
    unet().save_pretrained(folder / "unet")
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_bytes())
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=len(vocabulary) - 1,
        )
    )
    text.save_pretrained(folder / "text_encoder")
    kl_vae().save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def kl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=SCALING,
    )


def tiny_vae() -> AutoencoderTiny:
    """Of the KL autoencoder's factor; like TAESD it takes latents as denoisers see them, hence scale 1."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=1.0,
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes nothing, it is written as null."""
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def loaded(graph: Graph) -> nn.Module:
    """A graph's module with all of its weights in memory, as float32."""
    tensors = {name: stored.load().float() for name, stored in graph.weights.items()}
    graph.module.load_state_dict(tensors, strict=True, assign=True)
    return graph.module
