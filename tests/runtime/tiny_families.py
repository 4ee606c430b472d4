"""Valid bundles of a few kilobytes in the layout of further families, inpainting models and ControlNets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tandemrt.runtime.manifest import (
    Defaults,
    LatentSpace,
    Manifest,
    SchedulerDefaults,
    TextConditioning,
    TextEncoding,
)

from .tiny_bundle import (
    MAX_LENGTH,
    TEXT_WIDTH,
    controlnet,
    decoder,
    denoiser,
    encoder,
    text_encoder,
    write_bundle,
    write_tokenizer,
)

WIDTH_2, GUIDANCE_WIDTH, T5_LENGTH, SD3_WIDTH = 10, 16, 20, 24
FLOW = SchedulerDefaults(
    class_name="FlowMatchEulerDiscreteScheduler", config={"num_train_timesteps": 1000, "shift": 3.0}
)
LCM = SchedulerDefaults(
    class_name="LCMScheduler",
    config={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False},
)


def write_tiny_sdxl(folder: Path) -> Manifest:
    """Two text encoders side by side, of which the second pools; two denoisers that read pooled text and sizes."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    width = TEXT_WIDTH + WIDTH_2
    widths = {"encoder_hidden_states": width, "text_embeds": WIDTH_2, "time_ids": 6}
    components = {
        "text_encoder": text_encoder(
            "text_encoder", vocabulary, TEXT_WIDTH, ("last_hidden_state", "pooler_output", "hidden_states.1")
        ),
        "text_encoder_2": text_encoder(
            "text_encoder_2", vocabulary, WIDTH_2, ("text_embeds", "last_hidden_state", "hidden_states.3"), seed=7
        ),
        "unet": denoiser("unet", seed=1, hidden=8, widths=widths),
        "unet_small": denoiser("unet_small", seed=2, hidden=4, widths=widths),
        "vae_decoder": decoder("vae_decoder", seed=3, hidden=8),
    }
    encoders = {
        "text_encoder": TextEncoding(max_length=MAX_LENGTH, width=TEXT_WIDTH, hidden_state="hidden_states.1"),
        "text_encoder_2": TextEncoding(
            tokenizer="tokenizer_2",
            max_length=MAX_LENGTH,
            width=WIDTH_2,
            hidden_state="hidden_states.3",
            pooled="text_embeds",
            pooled_width=WIDTH_2,
        ),
    }
    return write_bundle(folder, components, TextConditioning(encoders=encoders, width=width, zero_negative=True))


def write_tiny_sd3(folder: Path, *, t5: bool = True) -> Manifest:
    """Two pooling encoders side by side and, behind them, a T5 or zeros; 16 channels, flow matching, a shift."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    encoded = {"text_encoder": TEXT_WIDTH, "text_encoder_2": WIDTH_2}
    components = {
        name: text_encoder(name, vocabulary, width, ("text_embeds", "last_hidden_state", "hidden_states.1"), seed=width)
        for name, width in encoded.items()
    }
    encoders = {
        name: TextEncoding(
            tokenizer=name.replace("text_encoder", "tokenizer"),
            max_length=MAX_LENGTH,
            width=width,
            hidden_state="hidden_states.1",
            pooled="text_embeds",
            pooled_width=width,
        )
        for name, width in encoded.items()
    }
    if t5:
        size = write_t5_tokenizer(folder / "tokenizer_3")
        components["text_encoder_3"] = text_encoder("text_encoder_3", size, SD3_WIDTH, ("last_hidden_state",), seed=5)
        encoders["text_encoder_3"] = TextEncoding(
            tokenizer="tokenizer_3", max_length=T5_LENGTH, width=SD3_WIDTH, joins="sequence"
        )
    widths = {"encoder_hidden_states": SD3_WIDTH, "pooled_projections": TEXT_WIDTH + WIDTH_2}
    for name, seed, hidden in (("transformer", 1, 8), ("transformer_small", 2, 4)):
        components[name] = denoiser(name, seed, hidden, widths=widths)
    components["vae_decoder"] = decoder("vae_decoder", seed=3, hidden=8, channels=16)
    return write_bundle(
        folder,
        components,
        TextConditioning(encoders=encoders, width=SD3_WIDTH, zero_tokens=0 if t5 else T5_LENGTH),
        latent=LatentSpace(channels=16, downsampling=8, scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=FLOW,
        defaults=Defaults(height=64, width=64, num_inference_steps=6, guidance_scale=7.0),
    )


def write_tiny_lcm(folder: Path) -> Manifest:
    """A denoiser distilled with a guidance embedding beside a plain one; time steps and eta of its own scheduler."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    components = {
        "text_encoder": text_encoder("text_encoder", vocabulary, TEXT_WIDTH, ("last_hidden_state",)),
        "unet": denoiser("unet", seed=1, hidden=8, widths={"timestep_cond": GUIDANCE_WIDTH}),
        "unet_plain": denoiser("unet_plain", seed=2, hidden=4),
        "vae_decoder": decoder("vae_decoder", seed=3, hidden=8),
    }
    encoders = {"text_encoder": TextEncoding(max_length=MAX_LENGTH, width=TEXT_WIDTH)}
    return write_bundle(
        folder,
        components,
        TextConditioning(encoders=encoders, width=TEXT_WIDTH),
        scheduler=LCM,
        defaults=Defaults(height=64, width=64, num_inference_steps=4, guidance_scale=8.5, timesteps=(799, 399)),
    )


def write_tiny_editing(folder: Path, *, encoded: str = "latent_parameters") -> Manifest:
    """A bundle with an encoder for images and, beside the plain denoiser, one for inpainting."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    components = {
        "text_encoder": text_encoder("text_encoder", vocabulary, TEXT_WIDTH, ("last_hidden_state",)),
        "unet": denoiser("unet", seed=1, hidden=8),
        "unet_inpaint": denoiser("unet_inpaint", seed=2, hidden=4, behind=5),
        "vae_encoder": encoder("vae_encoder", seed=5, output=encoded),
        "vae_decoder": decoder("vae_decoder", seed=3, hidden=8),
    }
    encoders = {"text_encoder": TextEncoding(max_length=MAX_LENGTH, width=TEXT_WIDTH)}
    return write_bundle(
        folder,
        components,
        TextConditioning(encoders=encoders, width=TEXT_WIDTH),
        latent=LatentSpace(channels=4, downsampling=8, scaling_factor=0.5, shift_factor=0.1),
    )


def write_tiny_control(folder: Path, names: Sequence[str] = ("canny", "depth")) -> Manifest:
    """ControlNets beside two denoisers they can steer, one they cannot, and one of another architecture."""
    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    components = {
        "text_encoder": text_encoder("text_encoder", vocabulary, TEXT_WIDTH, ("last_hidden_state",)),
        "unet": denoiser("unet", seed=1, hidden=8, steered=True),
        "unet_second": denoiser("unet_second", seed=6, hidden=8, steered=True),
        "unet_free": denoiser("unet_free", seed=2, hidden=4),
        "unet_other": denoiser("unet_other", seed=4, hidden=6, steered=True),
        "vae_encoder": encoder("vae_encoder", seed=5, output="latent_parameters"),
        "vae_decoder": decoder("vae_decoder", seed=3, hidden=8),
    }
    for seed, name in enumerate(names):
        components[f"controlnet_{name}"] = controlnet(f"controlnet_{name}", seed=10 + seed, hidden=8)
    encoders = {"text_encoder": TextEncoding(max_length=MAX_LENGTH, width=TEXT_WIDTH)}
    return write_bundle(folder, components, TextConditioning(encoders=encoders, width=TEXT_WIDTH))


def write_t5_tokenizer(folder: Path) -> int:
    """T5's kind of unigram tokenizer, which ends texts and begins none; returns the size of the vocabulary."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        ("\u2581red", -3.0),
        ("\u2581blue", -3.0),
    ]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(pieces)
