"""Whether the models of a bundle fit together: one latent space, one noise schedule, one text conditioning."""

from __future__ import annotations

import math
from typing import Any

from ..runtime.errors import CheckpointError, PlanError
from ..runtime.manifest import LatentSpace, PredictionType, SchedulerDefaults
from ..runtime.solvers import compile_table, resolve_solver
from ..runtime.solvers.config import KEYS, require_class
from .checkpoint import Checkpoint, DenoiserSource, Part
from .conditioning import text_conditioning
from .facts import DenoiserFacts, denoiser_facts, is_number, whole

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
    where, config = str(vae.config_path), vae.config
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise CheckpointError(f"{where}: {key}", "per-channel latent statistics", got=config[key], expected="null")
    scaling = config.get("scaling_factor", _SCALING_DEFAULTS[vae.class_name])
    shift = config.get("shift_factor") or 0.0
    if not is_number(scaling) or scaling <= 0 or not is_number(shift):
        raise CheckpointError(
            where, "scaling_factor and shift_factor", got=(scaling, shift), expected="a positive and a finite number"
        )
    return LatentSpace(
        channels=whole(vae, "latent_channels", 4),
        downsampling=2 ** (_stages(vae) - 1),
        scaling_factor=float(scaling),
        shift_factor=float(shift),
    )


def prediction_type(scheduler: SchedulerDefaults) -> PredictionType:
    """What a denoiser under this scheduler predicts.

    Raises:
        CheckpointError: not one of the known kinds.
    """
    if "beta_schedule" not in KEYS.get(scheduler.class_name, {"beta_schedule"}):
        return "flow"
    kind = _noise_fact(scheduler, "prediction_type") or "epsilon"
    if kind not in _PREDICTION_TYPES:
        raise CheckpointError(
            f"{scheduler.class_name}: prediction_type", "kind", got=kind, expected=", ".join(_PREDICTION_TYPES)
        )
    return kind  # type: ignore[no-any-return]  # checked the line above


def require_main(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint's own denoiser, VAE and text encoders fit together, and that its scheduler can be run.

    Raises:
        CheckpointError: they do not, and both values are named; or it cannot, and the key is named.
    """
    _require_channels(checkpoint.family.denoiser, denoiser_facts(checkpoint.denoiser), checkpoint)
    if checkpoint.vae_encoder is not None:
        require_decoder("vae_encoder", checkpoint.vae_encoder, checkpoint)
    prediction_type(checkpoint.scheduler)
    _require_scheduler("scheduler", checkpoint.scheduler)
    text_conditioning(checkpoint)


def require_denoiser(name: str, source: DenoiserSource, checkpoint: Checkpoint) -> None:
    """Check that a further denoiser can take over from the main one in mid-generation.

    One may take its guidance as an input and the other not: which branches run is decided step by step.

    Raises:
        CheckpointError: latent space, noise schedule, prediction type or text conditioning differ, and both are named;
            or its own scheduler cannot be run.
    """
    facts, main = denoiser_facts(source.part), denoiser_facts(checkpoint.denoiser)
    _require_channels(name, facts, checkpoint)
    _require_equal(f"{name}: cross_attention_dim", "text conditioning width", facts.text_width, main.text_width)
    _require_equal(f"{name}: pooled text", "width", facts.pooled_width, main.pooled_width)
    if source.scheduler is not None:
        _require_scheduler(f"{name}: scheduler", source.scheduler)
        for key in _NOISE_KEYS:
            ours, theirs = _noise_fact(checkpoint.scheduler, key), _noise_fact(source.scheduler, key)
            what = "prediction type" if key == "prediction_type" else "noise schedule"
            _require_equal(f"{name}: {key}", what, theirs, ours)
    require_latents(name, source, checkpoint)


def require_latents(name: str, source: DenoiserSource, checkpoint: Checkpoint) -> None:
    """Check that the autoencoder beside a denoiser, where there is one, scales latents as the main one does.

    Raises:
        CheckpointError: scale or shift differ; both values are named.
    """
    config = source.vae_config
    if config is None or "AutoencoderTiny" in (config.get("_class_name"), checkpoint.vae.class_name):
        return
    main = latent_space(checkpoint.vae)
    scale, shift = config.get("scaling_factor", _SCALING_DEFAULTS["AutoencoderKL"]), config.get("shift_factor") or 0.0
    _require_equal(f"{name}: scaling_factor", "latent space", scale, main.scaling_factor)
    _require_equal(f"{name}: shift_factor", "latent space", shift, main.shift_factor)


def require_controlnet(name: str, controlnet: Part, checkpoint: Checkpoint) -> None:
    """Check that a ControlNet steers the main denoiser: its results fit the UNet's skip connections one by one.

    Raises:
        CheckpointError: they do not, or latents, text conditioning or the picture's size differ; both are named.
    """
    facts, main = denoiser_facts(controlnet), denoiser_facts(checkpoint.denoiser)
    latent = latent_space(checkpoint.vae)
    _require_equal(f"{name}: in_channels", "latent channels", facts.in_channels, latent.channels)
    _require_equal(f"{name}: cross_attention_dim", "text conditioning width", facts.text_width, main.text_width)
    _require_equal(f"{name}: pooled text", "width", facts.pooled_width, main.pooled_width)
    _require_equal(f"{name}: skip connections", "channels and reductions", facts.residuals, main.residuals)
    widths = controlnet.config.get("conditioning_embedding_out_channels") or [16, 32, 96, 256]
    where = f"{name}: conditioning_embedding_out_channels"
    if not isinstance(widths, list):
        raise CheckpointError(where, "value", got=widths, expected="a list of widths")
    _require_equal(where, "reduction", 2 ** (len(widths) - 1), latent.downsampling)


def require_decoder(name: str, vae: Part, checkpoint: Checkpoint) -> None:
    """Check that a further decoder, or the main one's encoder, is of the main autoencoder's latents.

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


def _require_channels(name: str, facts: DenoiserFacts, checkpoint: Checkpoint) -> None:
    channels = latent_space(checkpoint.vae).channels
    # An inpainting UNet is also given the mask and the masked picture's latent.
    if facts.in_channels != 2 * channels + 1:
        _require_equal(f"{name}: in_channels", "latent channels", facts.in_channels, channels)
    _require_equal(f"{name}: out_channels", "latent channels", facts.out_channels, channels)


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
    same = math.isclose(got, main, rel_tol=1e-6) if is_number(got) and is_number(main) else got == main  # type: ignore[arg-type]
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
        raise CheckpointError(str(vae.config_path), "block_out_channels", got=widths, expected="a list of widths")
    return len(widths)
