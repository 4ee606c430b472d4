"""Names of tensors in the authors' own files, and what diffusers and transformers call them.

The layouts are those of CompVis/latent-diffusion, Stability-AI/generative-models and Stability-AI/sd3-ref; the
counterparts were read off diffusers' `loaders/single_file_utils.py`, against which the tests compare every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from ..runtime.original_names import UNET_IN_RESNETS, UNET_OUTSIDE_BLOCKS
from .presets import Model
from .remapped import Change, Origin

Names = dict[str, Origin]
Convert = Callable[[str], "Names | None"]
"""A tensor's name to the names of what it holds: empty for what inference does not need, None for what is unknown."""
Layout = Callable[[Collection[str], Model], Convert]
"""All names of a model's tensors, and the architecture they are for, to how each is converted."""

# Input block 0 is the first convolution, of no level.
_UNET_OUTER = re.compile(r"(?!input_blocks\.0)(input|output)_blocks\.(\d{1,3})\.([012])\.(.+)")
_UNET_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
_UNET_SAMPLER = re.compile(r"input_blocks\.([1-9]\d{0,2})\.0\.op\.weight")

_VAE_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d{1,3})\.(?:block\.(\d+)\.(.+)|(?:down|up)sample\.conv)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_([12])|attn_1)\.(.+)")
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ENDS = re.compile(r"(?:encoder|decoder)\.(?:conv_in|conv_out|norm_out)|(?:post_)?quant_conv")

_OPENCLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d{1,3})\.(.+)[._](weight|bias)")
_OPENCLIP_STEMS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

_MMDIT = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_MMDIT_SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
_MMDIT_BLOCK = re.compile(r"joint_blocks\.(\d{1,3})\.(x_block|context_block)\.(.+)")
_MMDIT_STEMS = {
    "x_block": {
        "attn.proj": "attn.to_out.0",
        "adaLN_modulation.1": "norm1.linear",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    "context_block": {
        "attn.proj": "attn.to_add_out",
        "adaLN_modulation.1": "norm1_context.linear",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}
_MMDIT_QKV = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}


def unet(names: Collection[str], model: Model) -> Convert:
    """A UNet of latent-diffusion, whose levels are numbered through."""
    samplers = [int(match[1]) for name in names if (match := _UNET_SAMPLER.fullmatch(name))]
    layers = min(samplers, default=1)  # of a level, its sampler counted

    def new_stem(stem: str) -> str | None:
        middle, outer = _UNET_MIDDLE.fullmatch(stem), _UNET_OUTER.fullmatch(stem)
        if middle is not None:
            return _unet_layer("mid_block", int(middle[1]) // 2, middle[2], attention=middle[1] == "1")
        if outer is None or stem in UNET_OUTSIDE_BLOCKS:
            return UNET_OUTSIDE_BLOCKS.get(stem)
        side, index, place, rest = outer.groups()
        level, layer = divmod(int(index) - (side == "input"), layers)
        if (side, place, rest) == ("input", "0", "op"):
            return f"down_blocks.{level}.downsamplers.0.conv"
        if side == "output" and place != "0" and rest == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv"
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        return _unet_layer(block, layer, rest, attention=place == "1") if place != "2" else None

    return lambda name: _with_stem(name, new_stem)


def autoencoder(names: Collection[str], model: Model) -> Convert:
    """An autoencoder of latent-diffusion, whose decoder counts its levels from the finest."""
    last = len(model.config["up_block_types"]) - 1

    def new_stem(stem: str) -> str | None:
        level, middle = _VAE_LEVEL.fullmatch(stem), _VAE_MIDDLE.fullmatch(stem)
        if level is not None:
            side, index, layer, rest = level.groups()
            block = f"{side}_blocks.{index if side == 'encoder.down' else last - int(index)}"
            if layer is None:
                return f"{block}.{side.split('.')[1]}samplers.0.conv"
            return f"{block}.resnets.{layer}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
        if middle is not None:
            side, layer, rest = middle.groups()
            if layer is not None:
                return f"{side}.mid_block.resnets.{int(layer) - 1}.{rest}"
            return f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[rest]}" if rest in _VAE_ATTENTION else None
        return stem.replace("norm_out", "conv_norm_out") if _VAE_ENDS.fullmatch(stem) else None

    # Attention was made of 1x1 convolutions.
    return lambda name: _with_stem(name, new_stem, "flattened" if ".attn_1." in name else "none")


def clip(names: Collection[str], model: Model) -> Convert:
    """transformers' own names; of a model without projection none is wanted, though merged files hold one."""
    unwanted = () if model.class_name == "CLIPTextModelWithProjection" else ("text_projection.weight",)
    return lambda name: {} if name in unwanted else {name: Origin(name)}


def t5(names: Collection[str], model: Model) -> Convert:
    """transformers' own names."""
    return lambda name: {name: Origin(name)}


def openclip(names: Collection[str], model: Model) -> Convert:
    """OpenCLIP's text tower: queries, keys and values in one matrix.

    Stable Diffusion 2 reads the hidden state before the last layer: its architecture lacks that layer and the
    projection, its files hold both.
    """
    projected, count = model.class_name == "CLIPTextModelWithProjection", model.config["num_hidden_layers"]

    def convert(name: str) -> Names | None:
        if name == "text_projection":
            return {"text_projection.weight": Origin(name, "transposed")} if projected else {}
        match = _OPENCLIP_LAYER.fullmatch(name)
        if match is None:
            return {_OPENCLIP[name]: Origin(name)} if name in _OPENCLIP else None
        layer, stem, kind = int(match[1]), match[2], match[3]
        target = f"text_model.encoder.layers.{layer}"
        if layer == count and not projected:
            return {}
        if stem == "attn.in_proj":
            return _blocks(name, [f"{target}.self_attn.{each}_proj.{kind}" for each in "qkv"])
        return {f"{target}.{_OPENCLIP_STEMS[stem]}.{kind}": Origin(name)} if stem in _OPENCLIP_STEMS else None

    return convert


def mmdit(names: Collection[str], model: Model) -> Convert:
    """SD3's transformer: queries, keys and values in one matrix; the last norms have shift and scale exchanged."""
    last = model.config["num_layers"] - 1

    def convert(name: str) -> Names | None:
        if name == "pos_embed":
            return {"pos_embed.pos_embed": Origin(name)}
        stem, _, kind = name.rpartition(".")
        match = _MMDIT_BLOCK.fullmatch(stem)
        if match is None:
            swapped = stem in _MMDIT_SWAPPED
            return _with_stem(name, {**_MMDIT, **_MMDIT_SWAPPED}.get, "halves swapped" if swapped else "none")
        layer, side, rest = int(match[1]), match[2], match[3]
        target = f"transformer_blocks.{layer}"
        if rest == "attn.qkv":
            return _blocks(name, [f"{target}.attn.{each}.{kind}" for each in _MMDIT_QKV[side]])
        new = _MMDIT_STEMS[side].get(rest)
        swapped = layer == last and new == "norm1_context.linear"
        return (
            None if new is None else {f"{target}.{new}.{kind}": Origin(name, "halves swapped" if swapped else "none")}
        )

    return convert


def _unet_layer(block: str, number: int, rest: str, *, attention: bool) -> str | None:
    if attention:
        return f"{block}.attentions.{number}.{rest}"
    return f"{block}.resnets.{number}.{UNET_IN_RESNETS[rest]}" if rest in UNET_IN_RESNETS else None


def _with_stem(name: str, new_stem: Callable[[str], str | None], change: Change = "none") -> Names | None:
    stem, _, kind = name.rpartition(".")
    new = new_stem(stem) if kind in ("weight", "bias") else None
    return None if new is None else {f"{new}.{kind}": Origin(name, change)}


def _blocks(name: str, targets: list[str]) -> Names:
    return {target: Origin(name, block=i, blocks=len(targets)) for i, target in enumerate(targets)}
