"""The names that the original Stable Diffusion code gives the modules of a UNet, from the names diffusers gives them.

The original counts blocks through (`input_blocks`, `middle_block`, `output_blocks` of CompVis/stable-diffusion,
ldm/modules/diffusionmodules/openaimodel.py; Stability-AI/generative-models for SDXL); diffusers counts them level by
level. Which ResNets, attentions and samplers a UNet has is read from its own names, so that no topology is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count, takewhile

UNET_OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_IN_RESNETS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_IN_RESNETS = {new: old for old, new in UNET_IN_RESNETS.items()}
_OUTSIDE_BLOCKS = {
    **{new: old for old, new in UNET_OUTSIDE_BLOCKS.items()},
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def original_unet_names(modules: Iterable[str]) -> dict[str, str]:
    """The original name of each of a UNet's modules that has one, by diffusers' name."""
    wanted = tuple(modules)
    blocks = _original_blocks(wanted)
    found = {}
    for module in wanted:
        parts = module.split(".")
        heads = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        head = next((head for head in heads if head in blocks), None)
        if head is not None:
            tail = module[len(head) + 1 :]
            inner = _IN_RESNETS.get(tail, tail) if ".resnets." in module else tail
            found[module] = f"{blocks[head]}.{inner}" if inner else blocks[head]
    return found


def _original_blocks(modules: Iterable[str]) -> dict[str, str]:
    """The original name of each ResNet, attention and sampler, and of what stands alone."""
    present = {".".join(parts[:length]) for parts in (m.split(".") for m in modules) for length in range(1, 5)}
    blocks = dict(_OUTSIDE_BLOCKS)
    number = 1
    for block in _numbered("down_blocks", present):
        for resnet in _numbered(f"{block}.resnets", present):
            blocks[resnet] = f"input_blocks.{number}.0"
            blocks[resnet.replace("resnets", "attentions")] = f"input_blocks.{number}.1"
            number += 1
        if f"{block}.downsamplers.0" in present:
            blocks[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block in _numbered("up_blocks", present):
        for resnet in _numbered(f"{block}.resnets", present):
            blocks[resnet] = f"output_blocks.{number}.0"
            blocks[resnet.replace("resnets", "attentions")] = f"output_blocks.{number}.1"
            number += 1
        # The last ResNet's block holds the upsampler, after the attention where there is one.
        place = 2 if f"{block}.attentions.0" in present else 1
        blocks[f"{block}.upsamplers.0"] = f"output_blocks.{number - 1}.{place}"
    return blocks


def _numbered(stem: str, present: set[str]) -> Iterable[str]:
    return takewhile(present.__contains__, (f"{stem}.{index}" for index in count()))
