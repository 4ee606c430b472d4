"""Architectures of published checkpoints, as data.

`models/` holds one configuration a file, `pipelines/` which of them make up a checkpoint as its authors publish it.
Weights are not part of a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from ...runtime.errors import ArgumentError
from ...runtime.manifest import Frozen, SchedulerDefaults

Scale = Literal["full", "tiny"]
SCALES: tuple[Scale, ...] = get_args(Scale)

_FOLDER = Path(__file__).parent
_TINY_DIVISOR = 8
# Configuration keys that are widths, in channels or groups of them, and sides; what divides one divides all.
_WIDTHS = frozenset(
    {
        "block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "block_mid_channels",
        "conditioning_embedding_out_channels", "norm_num_groups", "cross_attention_dim", "time_cond_proj_dim",
        "addition_time_embed_dim", "projection_class_embeddings_input_dim", "joint_attention_dim",
        "caption_projection_dim", "pooled_projection_dim", "hidden_size", "intermediate_size", "projection_dim",
        "d_model", "d_kv", "d_ff", "sample_size",
    }
)  # fmt: skip
# A UNet's key of the same name counts heads, whatever it says.
_WIDTHS_OF = {"SD3Transformer2DModel": frozenset({"attention_head_dim"})}


class Model(Frozen, frozen=True, kw_only=True):
    """One architecture: what its `config.json` says, and how many parameters that makes.

    published_parameters: what was published, rounded as it was; published_in: where. source: where the
    configuration comes from. pad_token: of the tokenizer that its authors ship with a text encoder.
    """

    class_name: str
    config: dict[str, Any]
    parameters: int
    source: str
    published_parameters: int | None = None
    published_in: str | None = None
    pad_token: str | None = None

    def scaled(self, scale: Scale) -> dict[str, Any]:
        """The configuration; `tiny` divides every width and side by 8 and leaves the topology as it is."""
        widths = _WIDTHS | _WIDTHS_OF.get(self.class_name, frozenset()) if scale == "tiny" else frozenset()
        return {key: _divided(value) if key in widths else value for key, value in self.config.items()}


class Preset(Frozen, frozen=True, kw_only=True):
    """One checkpoint: its models by folder, further ones (`unet_*`, `vae_decoder_*`, `controlnet_*`) by component.

    published_as: the repositories on the hub that hold it; none where its authors kept it. The rest is how it is
    sampled: `timesteps` replaces the scheduler's own, `eta` is the share of fresh noise, 0..1. source: where scheduler
    and steps come from, if they are not published with it.
    """

    published_as: tuple[str, ...]
    pipeline: str
    models: dict[str, str]
    added: dict[str, str]
    scheduler: SchedulerDefaults
    guidance_scale: float
    num_inference_steps: int
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
    source: str | None = None


def preset_names() -> tuple[str, ...]:
    """Every preset, sorted."""
    return tuple(sorted(path.stem for path in (_FOLDER / "pipelines").glob("*.json")))


def read_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ArgumentError: there is none of that name; those there are are listed.
    """
    if name not in preset_names():
        raise ArgumentError("--preset", "no such preset", got=name, expected=f"one of {', '.join(preset_names())}")
    return msgspec.json.decode((_FOLDER / "pipelines" / f"{name}.json").read_bytes(), type=Preset)


def model_file(name: str) -> Path:
    """The file that the architecture called `name` is read from."""
    return _FOLDER / "models" / f"{name}.json"


@cache
def models() -> Mapping[str, Model]:
    """Every architecture by name."""
    files = sorted((_FOLDER / "models").glob("*.json"))
    return {path.stem: msgspec.json.decode(path.read_bytes(), type=Model) for path in files}


def _divided(value: Any) -> Any:
    return [_divided(each) for each in value] if isinstance(value, list) else value // _TINY_DIVISOR
