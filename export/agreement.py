"""Whether the models of a bundle fit together: one latent space, one noise schedule, one text conditioning."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from ..runtime.errors import CheckpointError, PlanError
from ..runtime.manifest import LatentSpace, PredictionType, SchedulerDefaults
from ..runtime.solvers import compile_table, resolve_solver
from ..runtime.solvers.config import KEYS, require_class
from .checkpoint import Checkpoint, Config, DenoiserSource, Part

# UNet keys that add inputs or layers which the runtime does not feed; None or the value given switches them off.
_UNSUPPORTED_UNET_KEYS: dict[str, Any] = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "dual_cross_attention": False,
}
_NOISE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
# Enough for every order of every solver to be reached.
_STEPS_TRIED = 4
_SCALING_DEFAULTS = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_REMEDY = "Use models of one family."


def latent_space(vae: Part) -> LatentSpace:
    """The latent space an autoencoder spans.

    Raises:
        CheckpointError: per-channel statistics, which are not supported, or a scale that is not a positive number.
    """
    where, config = str(vae.folder / "config.json"), vae.config
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise CheckpointError(f"{where}: {key}", "per-channel latent statistics", got=config[key], expected="null")
    scaling = config.get("scaling_factor", _SCALING_DEFAULTS[vae.class_name])
    shift = config.get("shift_factor") or 0.0
    if not _is_number(scaling) or scaling <= 0 or not _is_number(shift):
        raise CheckpointError(
            where, "scaling_factor and shift_factor", got=(scaling, shift), expected="a positive and a finite number"
        )
    return LatentSpace(
        channels=_whole(where, config, "latent_channels", 4),
        downsampling=2 ** (_stages(vae) - 1),
        scaling_factor=float(scaling),
        shift_factor=float(shift),
    )


def prediction_type(scheduler: SchedulerDefaults) -> PredictionType:
    """What a denoiser under this scheduler predicts.

    Raises:
        CheckpointError: not one of the three kinds.
    """
    kind = _noise_fact(scheduler, "prediction_type") or "epsilon"
    if kind not in _PREDICTION_TYPES:
        raise CheckpointError(
            f"{scheduler.class_name}: prediction_type", "kind", got=kind, expected=", ".join(_PREDICTION_TYPES)
        )
    return kind  # type: ignore[no-any-return]  # checked the line above


def spatial_multiple(unet: Part) -> int:
    """What a latent's height and width must be multiples of: every down block but the last halves them."""
    blocks = unet.config.get("down_block_types")
    if not isinstance(blocks, list) or not blocks:
        raise CheckpointError(
            str(unet.folder / "config.json"), "down_block_types", got=blocks, expected="a list of names"
        )
    return int(2 ** (len(blocks) - 1))


def text_width(checkpoint: Checkpoint) -> int:
    """How wide the text encoder's hidden states are.

    Raises:
        CheckpointError: its configuration states no sensible width.
    """
    encoder = checkpoint.text_encoder
    return _whole(str(encoder.folder / "config.json"), encoder.config, "hidden_size", 512)


def text_limits(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many positions and how many tokens the text encoder knows.

    Raises:
        CheckpointError: its configuration states no sensible numbers.
    """
    where, config = str(checkpoint.text_encoder.folder / "config.json"), checkpoint.text_encoder.config
    return _whole(where, config, "max_position_embeddings", 77), _whole(where, config, "vocab_size", 49408)


def sample_size(unet: Part) -> tuple[int, int]:
    """Height and width of the latents a UNet was made for; 64 where it does not say.

    Raises:
        CheckpointError: neither a whole number nor two of them.
    """
    stated = unet.config.get("sample_size") or 64
    sizes = stated if isinstance(stated, list) else [stated, stated]
    if len(sizes) != 2 or any(not isinstance(size, int) or not 1 <= size <= 4096 for size in sizes):
        where = f"{unet.folder / 'config.json'}: sample_size"
        raise CheckpointError(where, "value", got=stated, expected="a whole number from 1 to 4096, or two")
    return sizes[0], sizes[1]


def require_main(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint's own UNet, VAE and text encoder fit together, and that its scheduler can be run.

    Raises:
        CheckpointError: they do not, and both values are named; or it cannot, and the key is named.
    """
    _require_unet("unet", checkpoint.unet, checkpoint)
    prediction_type(checkpoint.scheduler)
    _require_scheduler("scheduler", checkpoint.scheduler)
    sample_size(checkpoint.unet)
    width = text_width(checkpoint)
    if checkpoint.unet.config.get("cross_attention_dim", 1280) != width:
        raise CheckpointError(
            "unet: cross_attention_dim",
            "text conditioning width",
            got=checkpoint.unet.config.get("cross_attention_dim", 1280),
            expected=f"{width}, the text encoder's hidden_size",
        )


def require_denoiser(name: str, source: DenoiserSource, checkpoint: Checkpoint) -> None:
    """Check that a further denoiser can take over from the main one in mid-generation.

    Raises:
        CheckpointError: latent space, noise schedule, prediction type or text conditioning differ, and both are named;
            or its own scheduler cannot be run.
    """
    _require_unet(name, source.unet, checkpoint)
    width = text_width(checkpoint)
    _require_equal(
        f"{name}: cross_attention_dim",
        "text conditioning width",
        source.unet.config.get("cross_attention_dim", 1280),
        width,
    )
    if source.scheduler is not None:
        _require_scheduler(f"{name}: scheduler", source.scheduler)
        for key in _NOISE_KEYS:
            ours, theirs = _noise_fact(checkpoint.scheduler, key), _noise_fact(source.scheduler, key)
            what = "prediction type" if key == "prediction_type" else "noise schedule"
            _require_equal(f"{name}: {key}", what, theirs, ours)
    if source.vae_config is not None:
        main = latent_space(checkpoint.vae).scaling_factor
        theirs = source.vae_config.get("scaling_factor", main)
        tiny = "AutoencoderTiny" in (source.vae_config.get("_class_name"), checkpoint.vae.class_name)
        if not tiny:
            _require_equal(f"{name}: scaling_factor", "latent space", theirs, main)


def require_decoder(name: str, vae: Part, checkpoint: Checkpoint) -> None:
    """Check that a further decoder reads the main autoencoder's latents.

    An AutoencoderTiny says 1.0 whatever family it is of, so its scale proves nothing and is not compared.

    Raises:
        CheckpointError: channels, downsampling or scale differ; both values are named.
    """
    main, theirs = latent_space(checkpoint.vae), latent_space(vae)
    _require_equal(f"{name}: latent_channels", "latent space", theirs.channels, main.channels)
    _require_equal(f"{name}: downsampling", "latent space", theirs.downsampling, main.downsampling)
    if "AutoencoderTiny" not in (vae.class_name, checkpoint.vae.class_name):
        _require_equal(f"{name}: scaling_factor", "latent space", theirs.scaling_factor, main.scaling_factor)
        _require_equal(f"{name}: shift_factor", "latent space", theirs.shift_factor, main.shift_factor)


def _require_unet(name: str, unet: Part, checkpoint: Checkpoint) -> None:
    config, channels = unet.config, latent_space(checkpoint.vae).channels
    for key, off in _UNSUPPORTED_UNET_KEYS.items():
        if config.get(key, off) != off:
            raise CheckpointError(
                f"{name}: {key}", "conditioning that is not supported", got=config[key], expected=repr(off)
            )
    for key in ("in_channels", "out_channels"):
        _require_equal(f"{name}: {key}", "latent channels", config.get(key, 4), channels)
    spatial_multiple(unet)


def _require_scheduler(where: str, scheduler: SchedulerDefaults) -> None:
    """Check that a bundle's default schedule, which is this scheduler's, compiles."""
    try:
        require_class(scheduler.class_name)
        compile_table(*resolve_solver(scheduler.class_name, scheduler.config), _STEPS_TRIED)
    except PlanError as error:
        raise CheckpointError(
            where,
            f"cannot be run ({str(error).rstrip('.')})",
            remedy="Save the checkpoint with a scheduler that is supported.",
        ) from error


def _require_equal(where: str, what: str, got: object, main: object) -> None:
    same = math.isclose(got, main, rel_tol=1e-6) if _is_number(got) and _is_number(main) else got == main  # type: ignore[arg-type]
    if not same:
        raise CheckpointError(where, what, got=got, expected=f"{main!r} as in the main checkpoint", remedy=_REMEDY)


def _noise_fact(scheduler: SchedulerDefaults, key: str) -> Any:
    """The value diffusers' class goes by: None for a key that it does not know."""
    known = KEYS.get(scheduler.class_name, {}).get(key)
    value = scheduler.config.get(key, known.default) if known is not None else None
    # The one key of which the classes that lack it, and null, mean false.
    return bool(value) if key == "rescale_betas_zero_snr" else value


def _stages(vae: Part) -> int:
    key = "encoder_block_out_channels"
    widths = vae.config.get(key, vae.config.get("block_out_channels"))
    if not isinstance(widths, list) or not widths:
        raise CheckpointError(
            str(vae.folder / "config.json"), "block_out_channels", got=widths, expected="a list of widths"
        )
    return len(widths)


def _whole(where: str, config: Config | Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {key}", "value", got=value, expected="a whole number from 1 up")
    return value


def _is_number(value: object) -> bool:
    """Whether a value is a number that float64 can hold; neither NaN nor an integer of 400 digits is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
