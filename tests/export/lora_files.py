"""Small models of three families and LoRAs for them, in the layouts that LoRAs are published in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tandemrt.export.weights import SafetensorsFile, read_header
from tandemrt.runtime.original_names import original_unet_names

Tensors = dict[str, Tensor]
FLAT_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Factors:
    """An update as peft computes it, `alpha / rank * up @ down`; 4-D for convolutions."""

    down: Tensor
    up: Tensor
    alpha: float


Adapters = Mapping[str, Mapping[str, Factors]]
"""Updates by part and by the module's name in diffusers."""


def sd15() -> dict[str, nn.Module]:
    """Two levels, two ResNets each, convolutions before and after attention, the first text encoder's layout."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return {"unet": unet, "text_encoder": CLIPTextModel(_clip(16))}


def sdxl() -> dict[str, nn.Module]:
    """Three levels of which the first has no attention, several transformer blocks, linear layers around them."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=40,
        attention_head_dim=(2, 2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=48,
    )
    encoders = CLIPTextModel(_clip(16)), CLIPTextModelWithProjection(_clip(24))
    return {"unet": unet, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}


def sd3() -> dict[str, nn.Module]:
    """Two blocks of a transformer, the second without an output for the text; two text encoders."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
    )
    encoders = CLIPTextModelWithProjection(_clip(16)), CLIPTextModelWithProjection(_clip(24))
    return {"transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}


def write_weights(model: nn.Module, path: Path) -> SafetensorsFile:
    """A model's weights, as a part of a checkpoint has them."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return read_header(path)


def write_lora(tensors: Tensors, path: Path, **metadata: str) -> Path:
    """A LoRA's file; `metadata`: what its header holds besides."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def parts(models: Mapping[str, nn.Module], folder: Path) -> dict[Any, SafetensorsFile]:
    """The weights of several models, each in a file named after its part."""
    return {part: write_weights(model, folder / f"{part}.safetensors") for part, model in models.items()}


def adapters(
    models: Mapping[str, nn.Module],
    seed: int = 0,
    *,
    attention_only: bool = False,
    alphas: tuple[float, ...] = (4.0,),
) -> Adapters:
    """Random updates of ranks 1 to 3, alphas in turn, of every linear layer and convolution that LoRAs are made for."""
    attention, generator = ("to_q", "to_k", "to_v", "to_out.0"), torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, Factors]] = {}
    for part, model in models.items():
        if part.startswith("text"):
            wanted = ("q_proj", "k_proj", "v_proj", "out_proj", *(() if attention_only else ("fc1", "fc2")))
        else:
            wanted = attention if attention_only else ("",)
        found[part] = {
            name: _factors(module, 1 + index % 3, alphas[index % len(alphas)], generator)
            for index, (name, module) in enumerate(model.named_modules())
            if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(wanted)
        }
    return found


def kohya(updates: Adapters, *, original: bool = False, te: str = "lora_te1_") -> Tensors:
    """kohya-ss/sd-scripts' layout; `original`: with the UNet's original names, as it writes them for SDXL."""
    found: Tensors = {}
    for part, modules in updates.items():
        names = original_unet_names(modules) if original and part == "unet" else {}
        for module, factors in modules.items():
            prefix = te if part == "text_encoder" else FLAT_PREFIXES[part]
            name = prefix + _with_text_model(names.get(module, module), part).replace(".", "_")
            found[f"{name}.lora_down.weight"] = factors.down
            found[f"{name}.lora_up.weight"] = factors.up
            found[f"{name}.alpha"] = torch.tensor(factors.alpha)
    return found


def peft(updates: Adapters) -> Tensors:
    """diffusers' layout as peft names tensors; without alphas, which go into the tensors."""
    return _dotted(updates, ("lora_A", "lora_B"), ("lora_A", "lora_B"))


def diffusers(updates: Adapters) -> Tensors:
    """diffusers' layout with names of its own."""
    return _dotted(updates, ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up"))


def old_attention(updates: Adapters) -> Tensors:
    """diffusers' layout up to 0.21, of attention alone."""
    renamed = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    found: Tensors = {}
    for key, tensor in _dotted(updates, ("lora.down", "lora.up"), ("lora.down", "lora.up")).items():
        module, half = key.split(".lora.")
        last = next((name for name in renamed if module.endswith(f".{name}")), module.rpartition(".")[2])
        inner = "processor." if key.startswith("unet.") else ""
        found[f"{module.removesuffix(last)}{inner}{renamed.get(last, last)}_lora.{half}"] = tensor
    return found


def update(module: str, shape: tuple[int, ...], down: str = "lora_down", up: str = "lora_up") -> Tensors:
    """An update of rank 1 for a weight of a shape, without an alpha."""
    out, *rest = shape
    ones = (1,) * (len(rest) - 1)
    return {f"{module}.{down}.weight": torch.ones(1, *rest), f"{module}.{up}.weight": torch.ones(out, 1, *ones)}


def fused(weights: Tensors, updates: Iterable[tuple[Mapping[str, Factors], float]]) -> Tensors:
    """What the definition says: W + scale · alpha / rank · up @ down."""
    found = dict(weights)
    for modules, scale in updates:
        for module, factors in modules.items():
            product = torch.einsum("or,r...->o...", factors.up.flatten(1), factors.down)
            found[f"{module}.weight"] = found[f"{module}.weight"] + scale * factors.alpha / len(factors.down) * product
    return found


def fused_by_diffusers(pipeline: Any, files: Sequence[tuple[Path, float]]) -> None:
    """Load, weigh and fuse LoRAs as diffusers' documentation does; the pipeline's models are changed."""
    names = [f"lora_{index}" for index in range(len(files))]
    for name, (path, _) in zip(names, files, strict=True):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(names, [scale for _, scale in files])
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()


def _dotted(updates: Adapters, halves: tuple[str, str], text_halves: tuple[str, str]) -> Tensors:
    found: Tensors = {}
    for part, modules in updates.items():
        down, up = text_halves if part.startswith("text") else halves
        for module, factors in modules.items():
            name = f"{part}.{_with_text_model(module, part)}"
            found[f"{name}.{down}.weight"] = factors.down
            found[f"{name}.{up}.weight"] = factors.up * (factors.alpha / len(factors.down))
    return found


def _with_text_model(module: str, part: str) -> str:
    """Published LoRAs name the modules of text encoders as older versions of transformers do."""
    return module if module.startswith("text_model.") or not part.startswith("text") else f"text_model.{module}"


def _factors(module: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> Factors:
    out, *rest = module.weight.shape
    ones = (1,) * (len(rest) - 1)
    down = torch.randn(rank, *rest, generator=generator) / 8
    return Factors(down, torch.randn(out, rank, *ones, generator=generator) / 8, alpha)


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=24,
        bos_token_id=48,
        eos_token_id=49,
    )
