"""Autoencoders as graphs: a decoder, and an encoder."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from ..runtime.manifest import LatentSpace, TensorSpec
from .agreement import latent_space
from .checkpoint import Part
from .facts import whole
from .lazy import parameters_on_meta, stored_tensors
from .modules import UNUSABLE, Graph, fill, float_spec, frozen, full_config, unusable
from .pruned import autoencoder_kl_from_config

Tensors = tuple[TensorSpec, ...]

# diffusers' names for an autoencoder's attention up to 0.13, which published checkpoints still carry.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class _Decoder(nn.Module):
    """A decoder in the bundle's latent space: `own = latent · scale + shift` leads from there to the module's."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, scale: float, shift: float) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.decoder = vae.decoder
        self._scale, self._shift = scale, shift

    def forward(self, latent_sample: Tensor) -> Tensor:
        if (self._scale, self._shift) != (1.0, 0.0):
            latent_sample = latent_sample * self._scale + self._shift
        if self.post_quant_conv is not None:
            latent_sample = self.post_quant_conv(latent_sample)
        return self.decoder(latent_sample)


class _Encoder(nn.Module):
    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None)

    def forward(self, sample: Tensor) -> Tensor:
        encoded = self.encoder(sample)
        return encoded if self.quant_conv is None else self.quant_conv(encoded)


def decoder_graph(part: Part, bundle: LatentSpace) -> Graph:
    """An autoencoder's decoder: latent_sample (B, C, h, w) in the bundle's latent space → sample (B, 3, H, W) in -1..1.

    Decoders are given `latent / scaling_factor + shift_factor` of the bundle; one that states another scale, as
    TAESD's 1.0 beside Stable Diffusion's 0.18215, gets the difference built in.
    """
    vae, own = _autoencoder(part), latent_space(part)
    scale = bundle.scaling_factor / own.scaling_factor
    inputs, outputs = decoder_tensors(part, bundle)
    return Graph(
        role="vae_decoder",
        module=frozen(_Decoder(vae, scale, own.shift_factor - bundle.shift_factor * scale)),
        inputs=inputs,
        outputs=outputs,
        config=full_config(vae.config, part),
    )


def encoder_graph(part: Part) -> Graph:
    """An autoencoder's encoder: sample (B, 3, H, W) in -1..1 → latent_parameters (B, 2C, H/f, W/f).

    The first C channels of latent_parameters are a Gaussian's mean, the others its log variance. An AutoencoderTiny
    has no distribution: its output is the latent itself, `latent_sample` (B, C, H/f, W/f).
    """
    vae = _autoencoder(part)
    inputs, outputs = encoder_tensors(part)
    return Graph(
        role="vae_encoder",
        module=frozen(_Encoder(vae)),
        inputs=inputs,
        outputs=outputs,
        config=full_config(vae.config, part),
        multiple=latent_space(part).downsampling,
    )


def decoder_tensors(part: Part, bundle: LatentSpace) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of `decoder_graph`."""
    channels, factor = whole(part, "out_channels", 3), bundle.downsampling
    return (
        (float_spec("latent_sample", "batch", bundle.channels, "height", "width"),),
        (float_spec("sample", "batch", channels, f"{factor} * height", f"{factor} * width"),),
    )


def encoder_tensors(part: Part) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of `encoder_graph`."""
    space, tiny = latent_space(part), part.class_name == "AutoencoderTiny"
    name, channels = ("latent_sample", space.channels) if tiny else ("latent_parameters", 2 * space.channels)
    factor = space.downsampling
    return (
        (float_spec("sample", "batch", whole(part, "in_channels", 3), "height", "width"),),
        (float_spec(name, "batch", channels, f"height // {factor}", f"width // {factor}"),),
    )


def _autoencoder(part: Part) -> AutoencoderKL | AutoencoderTiny:
    tensors = stored_tensors(part.weights)
    try:
        with parameters_on_meta():
            if part.class_name == "AutoencoderTiny":
                vae = AutoencoderTiny.from_config(dict(part.config))
            else:
                vae = autoencoder_kl_from_config(part.config)
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(vae, {_modern_name(name): tensor for name, tensor in tensors.items()}, part)
    return vae


def _modern_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    stem, _, last = name.rpartition(".")
    head, _, layer = stem.rpartition(".")
    return f"{head}.{_OLD_ATTENTION[layer]}.{last}" if layer in _OLD_ATTENTION else name
