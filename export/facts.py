"""What a model's configuration says, read with care: a checkpoint may state anything."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import CheckpointError
from .checkpoint import Part

# Conditioning that the runtime does not feed or the graphs do not have; None or the value given is without it.
_UNSUPPORTED: dict[str, Any] = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "dual_attention_layers": [],
    "global_pool_conditions": False,
    "conditioning_channels": 3,
}
TIME_IDS = 6
"""SDXL's: original height and width, crop top and left, target height and width."""

Residual = tuple[int, int]
"""A skip connection: its channels, and how many times smaller than the latent's its sides are."""


@dataclass(frozen=True)
class DenoiserFacts:
    """What a denoiser takes and gives; a width of 0 stands for an input that it does not have.

    text_width: of `encoder_hidden_states`. pooled_width: of SDXL's `text_embeds` or SD3's `pooled_projections`.
    guidance_width: of `timestep_cond`, the embedded guidance scale. multiple: what a latent's sides must be multiples
    of. sample_size: height and width of the latents it was made for. residuals: a UNet's skip connections and its
    middle, where a ControlNet's results are added; a ControlNet's results themselves.
    """

    in_channels: int
    out_channels: int
    text_width: int
    pooled_width: int
    guidance_width: int
    multiple: int
    sample_size: tuple[int, int]
    residuals: tuple[Residual, ...]


def denoiser_facts(part: Part) -> DenoiserFacts:
    """The facts of a UNet or a transformer.

    Raises:
        CheckpointError: a value that cannot be, or conditioning that is not supported.
    """
    for key, off in _UNSUPPORTED.items():
        if part.config.get(key) not in (None, off):
            what = "conditioning that is not supported"
            raise CheckpointError(f"{_where(part)}: {key}", what, got=part.config[key], expected=repr(off))
    transformer = part.class_name == "SD3Transformer2DModel"
    channels = whole(part, "in_channels", 16 if transformer else 4)
    return DenoiserFacts(
        in_channels=channels,
        out_channels=whole(part, "out_channels", channels),
        text_width=whole(part, *(("joint_attention_dim", 4096) if transformer else ("cross_attention_dim", 1280))),
        pooled_width=whole(part, "pooled_projection_dim", 2048) if transformer else _added_text_width(part),
        guidance_width=0 if part.config.get("time_cond_proj_dim") is None else whole(part, "time_cond_proj_dim", 256),
        multiple=whole(part, "patch_size", 2) if transformer else _halvings(part),
        sample_size=_sample_size(part, 128 if transformer else 64),
        residuals=() if transformer else _residuals(part),
    )


def whole(part: Part, key: str, default: int) -> int:
    """A whole number from 1 up out of a configuration.

    Raises:
        CheckpointError: it states something else.
    """
    value = part.config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{_where(part)}: {key}", "value", got=value, expected="a whole number from 1 up")
    return value


def is_number(value: object) -> bool:
    """Whether a value is a number that float64 can hold; neither NaN nor an integer of 400 digits is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _added_text_width(unet: Part) -> int:
    """The width of `text_embeds`, which SDXL's UNets embed together with six `time_ids`."""
    kind = unet.config.get("addition_embed_type")
    if kind is None:
        return 0
    if kind != "text_time":
        where, what = f"{_where(unet)}: addition_embed_type", "conditioning that is not supported"
        raise CheckpointError(where, what, got=kind, expected="None or 'text_time'")
    joined = whole(unet, "projection_class_embeddings_input_dim", 2816)
    ids = whole(unet, "addition_time_embed_dim", 256)
    if joined <= TIME_IDS * ids:
        raise CheckpointError(
            f"{_where(unet)}: projection_class_embeddings_input_dim",
            "no room for pooled text beside six embedded time_ids",
            got=joined,
            expected=f"over {TIME_IDS} x {ids}",
        )
    return joined - TIME_IDS * ids


def _halvings(unet: Part) -> int:
    """Every down block but the last halves a latent's sides."""
    blocks = unet.config.get("down_block_types")
    if not isinstance(blocks, list) or not blocks:
        raise CheckpointError(f"{_where(unet)}", "down_block_types", got=blocks, expected="a list of names")
    return int(2 ** (len(blocks) - 1))


def _residuals(unet: Part) -> tuple[Residual, ...]:
    """One after the first convolution, after every layer and after every halving, then the middle."""
    stages = len(unet.config["down_block_types"])
    widths = _for_each_stage(unet, "block_out_channels", [320, 640, 1280, 1280], stages)
    layers = _for_each_stage(unet, "layers_per_block", 2, stages)
    found = [(widths[0], 1)]
    for stage, (width, count) in enumerate(zip(widths, layers, strict=True)):
        found += [(width, 2**stage)] * count
        if stage + 1 < stages:
            found.append((width, 2 ** (stage + 1)))
    return *found, (widths[-1], 2 ** (stages - 1))


def _for_each_stage(unet: Part, key: str, default: object, stages: int) -> list[int]:
    stated = unet.config.get(key, default)
    values = stated if isinstance(stated, list) else [stated] * stages
    if len(values) != stages or any(not isinstance(value, int) or value < 1 for value in values):
        raise CheckpointError(
            f"{_where(unet)}: {key}", "values", got=stated, expected=f"{stages} whole numbers from 1 up"
        )
    return values


def _sample_size(part: Part, default: int) -> tuple[int, int]:
    stated = part.config.get("sample_size") or default
    sizes = stated if isinstance(stated, list) else [stated, stated]
    if len(sizes) != 2 or any(not isinstance(size, int) or not 1 <= size <= 4096 for size in sizes):
        expected = "a whole number from 1 to 4096, or two"
        raise CheckpointError(f"{_where(part)}: sample_size", "value", got=stated, expected=expected)
    return sizes[0], sizes[1]


def _where(part: Part) -> str:
    return str(part.config_path)
