"""Small models in one file of their authors' layout, by the inverse of what reading such files does.

Written from the authors' side: how latent-diffusion numbers its blocks, how OpenCLIP and sd3-ref fuse projections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

import msgspec
import torch
from torch import Tensor

from tandemrt.export.presets import Model, models, read_preset
from tandemrt.export.random_checkpoint import build

State = dict[str, Tensor]
VOCABULARY = 600
_SHRUNK: Mapping[str, Mapping[str, int]] = {
    "T5EncoderModel": {"vocab_size": VOCABULARY, "num_layers": 2},
    "CLIP": {"vocab_size": VOCABULARY},
    "SD3Transformer2DModel": {"num_layers": 3, "pos_embed_max_size": 24},
}
_PREFIXES = {
    "StableDiffusionPipeline": {"text_encoder": "cond_stage_model."},
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    "StableDiffusion3Pipeline": {
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
}
_SIDES = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "norm1.linear", "ff"),
    "context_block": (
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "norm1_context.linear",
        "ff_context",
    ),
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def small_models(preset: str) -> dict[str, Model]:
    """The architectures of a preset at an eighth of their widths, of fewer tokens and blocks, by name."""
    return {name: _small_model(name) for name in read_preset(preset).models.values()}


def random_states(preset: str) -> dict[str, State]:
    """Random float16 tensors of the preset's small models under their libraries' names, by component."""
    torch.manual_seed(0)
    small = small_models(preset)
    return {component: _random(small[name]) for component, name in read_preset(preset).models.items()}


def original(preset: str, states: Mapping[str, State], small: Mapping[str, Model] | None = None) -> State:
    """The same tensors as one file of the authors' holds them; `small`: the architectures, those of the preset."""
    kind, own = read_preset(preset), small or small_models(preset)
    prefixes = {**_PREFIXES[kind.pipeline], "vae": "first_stage_model."}
    file: State = {}
    for component, state in states.items():
        name = kind.models[component]
        fused = name.startswith("openclip") and kind.pipeline != "StableDiffusion3Pipeline"
        inverse = _openclip if fused else _INVERSES.get(component, _transformers)
        for old, tensor in inverse(state, own[name]).items():
            file[prefixes.get(component, "model.diffusion_model.") + old] = tensor.contiguous()
    return file


@cache
def _small_model(name: str) -> Model:
    model = models()[name]
    shrunk = next((keys for kind, keys in _SHRUNK.items() if model.class_name.startswith(kind)), {})
    small = msgspec.structs.replace(model, config={**model.scaled("tiny"), **shrunk})
    with torch.device("meta"):
        count = sum(weight.numel() for weight in build(small, "full").parameters())
    return msgspec.structs.replace(small, parameters=count)


def _random(model: Model) -> State:
    with torch.device("meta"):
        state: State = build(model, "full").state_dict()
    return {name: torch.rand(tensor.shape).half() for name, tensor in state.items()}


def _unet(state: State, model: Model) -> State:
    per_level = model.config["layers_per_block"] + 1
    with_attention = {name.rsplit(".attentions.", 1)[0] for name in state if ".attentions." in name}

    def renamed(name: str) -> str:
        for new, old in (
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
            ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
        ):
            if name.startswith(new + "."):
                return old + name.removeprefix(new)
        side, *rest = name.split(".")
        if side == "mid_block":
            number = int(rest[1])
            return ".".join(["middle_block", "1" if rest[0] == "attentions" else str(2 * number), *_inner(rest)])
        level, kind, layer = int(rest[0]), rest[1], int(rest[2])
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            place = 2 if f"up_blocks.{level}" in with_attention else 1
            return f"output_blocks.{(level + 1) * per_level - 1}.{place}.conv.{rest[-1]}"
        index = level * per_level + layer
        block = f"input_blocks.{index + 1}" if side == "down_blocks" else f"output_blocks.{index}"
        return ".".join([block, "1" if kind == "attentions" else "0", *_inner(rest[1:])])

    return {renamed(name): tensor for name, tensor in state.items()}


def _inner(rest: list[str]) -> list[str]:
    """What follows a block's number: of a ResNet its layers' old names, of an attention the names as they are."""
    kind, _, *inner = rest
    return [_RESNET[inner[0]], *inner[1:]] if kind == "resnets" else inner


def _vae(state: State, model: Model) -> State:
    levels = len(model.config["up_block_types"])
    renames: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.conv"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    )
    file: State = {}
    for name, tensor in state.items():
        old = name
        for pattern, replacement in renames:
            old = re.sub(pattern, replacement, old)
        file[old] = tensor[:, :, None, None] if ".attn_1." in old and tensor.ndim == 2 else tensor
    return file


def _transformers(state: State, model: Model) -> State:
    prefix = (
        "" if model.class_name != "CLIPTextModel" or any(n.startswith("text_model.") for n in state) else "text_model."
    )
    kept = {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    return {f"transformer.{prefix}{name}": tensor for name, tensor in kept.items()}


def _openclip(state: State, model: Model) -> State:
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    file = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(1.0),
    }
    for layer in range(model.config["num_hidden_layers"]):
        new, old = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            fused = [state[f"{new}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            file[f"{old}.attn.in_proj_{kind}"] = torch.cat(fused)
            file[f"{old}.attn.out_proj.{kind}"] = state[f"{new}.self_attn.out_proj.{kind}"]
            for ours, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
                file[f"{old}.{theirs}.{kind}"] = state[f"{new}.{ours}.{kind}"]
            for ours, theirs in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                file[f"{old}.{theirs}.{kind}"] = state[f"{new}.{ours}.{kind}"]
    width = model.config["hidden_size"]
    if "text_projection.weight" in state:
        file["text_projection"] = state["text_projection.weight"].T
    else:
        # The layer and the projection that Stable Diffusion 2 does without.
        last = model.config["num_hidden_layers"] - 1
        file["text_projection"] = torch.ones(width, width)
        for name in [name for name in file if name.startswith(f"transformer.resblocks.{last}.")]:
            file[name.replace(f".{last}.", f".{last + 1}.", 1)] = torch.ones_like(file[name])
    return {f"model.{name}": tensor for name, tensor in file.items()}


def _mmdit(state: State, model: Model) -> State:
    file: State = {"pos_embed": state["pos_embed.pos_embed"]}
    last = model.config["num_layers"] - 1
    for kind in ("weight", "bias"):
        for new, old in (
            ("pos_embed.proj", "x_embedder.proj"),
            ("context_embedder", "context_embedder"),
            ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
            ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
            ("proj_out", "final_layer.linear"),
        ):
            file[f"{old}.{kind}"] = state[f"{new}.{kind}"]
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        file[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for layer, (side, parts) in product(range(last + 1), _SIDES.items()):
            new, old = f"transformer_blocks.{layer}", f"joint_blocks.{layer}.{side}"
            *projections, out, norm, feed = (f"{new}.{part}" for part in parts)
            file[f"{old}.attn.qkv.{kind}"] = torch.cat([state[f"{each}.{kind}"] for each in projections])
            modulation = state[f"{norm}.{kind}"]
            if side == "context_block" and layer == last:
                # The last block's text is not read on: it has a final norm and nothing behind attention.
                scale, shift = modulation.chunk(2)
                file[f"{old}.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
                continue
            file[f"{old}.adaLN_modulation.1.{kind}"] = modulation
            file[f"{old}.attn.proj.{kind}"] = state[f"{out}.{kind}"]
            file[f"{old}.mlp.fc1.{kind}"] = state[f"{feed}.net.0.proj.{kind}"]
            file[f"{old}.mlp.fc2.{kind}"] = state[f"{feed}.net.2.{kind}"]
    return file


_INVERSES: Mapping[str, Callable[[State, Model], State]] = {"unet": _unet, "vae": _vae, "transformer": _mmdit}


def config_of(preset: str, component: str) -> dict[str, Any]:
    """A small model's configuration."""
    return small_models(preset)[read_preset(preset).models[component]].config
