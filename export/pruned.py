"""Structurally pruned diffusers modules: blocks whose inner widths and heads differ from what their config implies.

Hybrid-SD (arXiv 2408.06646) narrows the inside of ResNet blocks and drops attention heads layer by layer while the
class in `config.json` stays the stock one, which then builds the wrong shapes. Its small VAE narrows the decoder
alone. The functions here reshape a stock module to the tensors a checkpoint really holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

Shapes = Mapping[str, tuple[int, ...]]


def resize_inner_widths(unet: UNet2DConditionModel, shapes: Shapes) -> None:
    """Give `unet`'s ResNet blocks and attentions, in place, the inner widths that `shapes` (tensor name → shape) has.

    Resized layers get fresh weights. Names missing from `shapes` are left as they are: loading the state dict names
    them. Head width stays the config's; the number of heads follows from the width.
    """
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D) and f"{name}.conv1.weight" in shapes:
            _resize_resnet(module, shapes[f"{name}.conv1.weight"][0])
        elif isinstance(module, Attention) and f"{name}.to_q.weight" in shapes:
            _resize_attention(module, shapes[f"{name}.to_q.weight"][0])


def pruned_shapes(unet: UNet2DConditionModel, pruning: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """What Hybrid-SD's three configuration lists mean for `unet`, as `resize_inner_widths` reads it.

    `block_mid_channels`, `block_selfattn_heads` and `block_crossattn_heads` have one entry for each ResNet block, down
    blocks first; entries for heads where a block has no attention are not read.
    """
    layers = [
        (f"{kind}.{i}", j)
        for kind in ("down_blocks", "up_blocks")
        for i, block in enumerate(getattr(unet, kind))
        for j in range(len(block.resnets))
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    lists = (pruning["block_mid_channels"], pruning["block_selfattn_heads"], pruning["block_crossattn_heads"])
    for (block, layer), width, *heads in zip(layers, *lists, strict=True):
        shapes[f"{block}.resnets.{layer}.conv1.weight"] = (width,)
        for attention, count in zip(("attn1", "attn2"), heads, strict=True):
            name = f"{block}.attentions.{layer}.transformer_blocks.0.{attention}"
            with contextlib.suppress(AttributeError):
                stock = unet.get_submodule(name)
                shapes[f"{name}.to_q.weight"] = (count * stock.inner_dim // stock.heads,)
    return shapes


def autoencoder_kl_from_config(config: Mapping[str, Any]) -> AutoencoderKL:
    """An `AutoencoderKL`, whose decoder may be narrower than its encoder.

    Hybrid-SD's small VAE states `encoder_block_out_channels` and `decoder_block_out_channels` apart; the stock class
    knows only `block_out_channels`, taken for both where those keys are missing.
    """
    encoder_widths = config.get("encoder_block_out_channels", config.get("block_out_channels"))
    stock = {key: value for key, value in config.items() if not key.endswith("coder_block_out_channels")}
    vae = AutoencoderKL.from_config({**stock, "block_out_channels": encoder_widths})
    decoder_widths = config.get("decoder_block_out_channels")
    if decoder_widths is not None:
        vae.decoder = Decoder(
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.out_channels,
            up_block_types=vae.config.up_block_types,
            block_out_channels=tuple(decoder_widths),
            layers_per_block=vae.config.layers_per_block,
            norm_num_groups=vae.config.norm_num_groups,
            act_fn=vae.config.act_fn,
            mid_block_add_attention=vae.config.mid_block_add_attention,
        )
        vae.register_to_config(
            encoder_block_out_channels=tuple(encoder_widths or ()),
            decoder_block_out_channels=tuple(decoder_widths),
        )
    return vae


def _resize_resnet(block: ResnetBlock2D, width: int) -> None:
    old = block.conv1.out_channels
    if width == old:
        return
    block.conv1 = nn.Conv2d(block.conv1.in_channels, width, 3, padding=1)
    block.conv2 = nn.Conv2d(width, block.conv2.out_channels, 3, padding=1)
    block.norm2 = nn.GroupNorm(block.norm2.num_groups, width, eps=block.norm2.eps)
    if block.time_emb_proj is not None:
        factor = block.time_emb_proj.out_features // old
        block.time_emb_proj = nn.Linear(block.time_emb_proj.in_features, width * factor)


def _resize_attention(attention: Attention, width: int) -> None:
    if width == attention.inner_dim:
        return
    head_width = attention.inner_dim // attention.heads
    for name in ("to_q", "to_k", "to_v"):
        old = getattr(attention, name)
        setattr(attention, name, nn.Linear(old.in_features, width, bias=old.bias is not None))
    out = attention.to_out[0]
    attention.to_out[0] = nn.Linear(width, out.out_features, bias=out.bias is not None)
    attention.heads = width // head_width
    attention.inner_dim = attention.inner_kv_dim = width
