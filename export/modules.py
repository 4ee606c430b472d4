"""Torch modules from checkpoint parts: stock or pruned architectures, filled strictly, wrapped as graphs to export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..runtime.errors import CheckpointError
from ..runtime.manifest import LatentSpace, Role, TensorSpec
from .agreement import latent_space, spatial_multiple
from .checkpoint import Part
from .pruned import autoencoder_kl_from_config, resize_inner_widths
from .weights import listed, load_tensors

# What diffusers and transformers raise for a configuration whose values they cannot work with.
_UNUSABLE = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError, ZeroDivisionError,
    ImportError,
)  # fmt: skip
# diffusers' names for an autoencoder's attention up to 0.13, which published checkpoints still carry.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Graph:
    """A module to export, with what its ONNX graph takes and gives.

    `multiple`: height and width, as the graph's main input has them, must be multiples of it.
    `config`: what `config.json` beside the model says, every default written out.
    """

    role: Role
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    config: Mapping[str, Any]
    multiple: int = 1

    @property
    def parameters(self) -> int:
        """How many weights the graph holds."""
        return sum(parameter.numel() for parameter in self.module.parameters())


class _Denoiser(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _TextEncoder(nn.Module):
    def __init__(self, text_model: CLIPTextModel) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.text_model(input_ids=input_ids)
        return encoded.last_hidden_state, encoded.pooler_output


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


def denoiser_graph(part: Part, text_width: int) -> Graph:
    """A UNet, its inner widths those of the tensors.

    Inputs: sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, sequence, text_width); all float32.
    """
    tensors = load_tensors(part.weights)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(part.config))
            resize_inner_widths(unet, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except _UNUSABLE as error:
        raise _unusable(part, error) from error
    _fill(unet, tensors, part)
    channels = unet.config.in_channels
    latent = _float("sample", "batch", channels, "height", "width")
    text = _float("encoder_hidden_states", "batch", "sequence", text_width)
    return Graph(
        role="denoiser",
        module=_frozen(_Denoiser(unet)),
        inputs=(latent, _float("timestep", "batch"), text),
        outputs=(_float("out_sample", "batch", unet.config.out_channels, "height", "width"),),
        config=_full_config(unet.config, part),
        multiple=spatial_multiple(part),
    )


def text_encoder_graph(part: Part) -> Graph:
    """CLIP's text model: input_ids (B, sequence) int64 → last_hidden_state (B, sequence, D), pooler_output (B, D)."""
    tensors = load_tensors(part.weights)
    try:
        model = CLIPTextModel(CLIPTextConfig(**{**part.config, "attn_implementation": "eager", "dtype": "float32"}))
    except _UNUSABLE as error:
        raise _unusable(part, error) from error
    _fill(model, _clip_names(tensors, model.state_dict()), part)
    width = model.config.hidden_size
    return Graph(
        role="text_encoder",
        module=_frozen(_TextEncoder(model)),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(_float("last_hidden_state", "batch", "sequence", width), _float("pooler_output", "batch", width)),
        config=part.config,
    )


def decoder_graph(part: Part, bundle: LatentSpace) -> Graph:
    """An autoencoder's decoder: latent_sample (B, C, h, w) in the bundle's latent space → sample (B, 3, H, W) in -1..1.

    Decoders are given `latent / scaling_factor + shift_factor` of the bundle; one that states another scale, as
    TAESD's 1.0 beside Stable Diffusion's 0.18215, gets the difference built in.
    """
    vae, own = _autoencoder(part), latent_space(part)
    scale = bundle.scaling_factor / own.scaling_factor
    factor = bundle.downsampling
    return Graph(
        role="vae_decoder",
        module=_frozen(_Decoder(vae, scale, own.shift_factor - bundle.shift_factor * scale)),
        inputs=(_float("latent_sample", "batch", bundle.channels, "height", "width"),),
        outputs=(_float("sample", "batch", vae.config.out_channels, f"{factor} * height", f"{factor} * width"),),
        config=_full_config(vae.config, part),
    )


def encoder_graph(part: Part) -> Graph:
    """An autoencoder's encoder: sample (B, 3, H, W) in -1..1 → latent_parameters (B, 2C, H/f, W/f).

    The first C channels of latent_parameters are a Gaussian's mean, the others its log variance. An AutoencoderTiny
    has no distribution: its output is the latent itself, `latent_sample` (B, C, H/f, W/f).
    """
    vae, space = _autoencoder(part), latent_space(part)
    tiny, factor = part.class_name == "AutoencoderTiny", space.downsampling
    name, channels = ("latent_sample", space.channels) if tiny else ("latent_parameters", 2 * space.channels)
    return Graph(
        role="vae_encoder",
        module=_frozen(_Encoder(vae)),
        inputs=(_float("sample", "batch", vae.config.in_channels, "height", "width"),),
        outputs=(_float(name, "batch", channels, f"height // {factor}", f"width // {factor}"),),
        config=_full_config(vae.config, part),
        multiple=factor,
    )


def _autoencoder(part: Part) -> AutoencoderKL | AutoencoderTiny:
    tensors = load_tensors(part.weights)
    try:
        with torch.device("meta"):
            if part.class_name == "AutoencoderTiny":
                vae = AutoencoderTiny.from_config(dict(part.config))
            else:
                vae = autoencoder_kl_from_config(part.config)
    except _UNUSABLE as error:
        raise _unusable(part, error) from error
    _fill(vae, {_modern_name(name): tensor for name, tensor in tensors.items()}, part)
    return vae


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], part: Part) -> None:
    """Put tensors in a module's place, all of them and no others.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; they are named.
    """
    where, expected = str(part.weights.files[0]), {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    misfits = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in found.keys() & expected
        if found[name] != expected[name]
    ]
    for what, names in (
        ("missing weights", expected.keys() - found),
        ("weights that the architecture has no place for", found.keys() - expected),
        ("weights of another shape", misfits),
    ):
        if names:
            raise CheckpointError(
                where,
                f"{what}: {listed(names)}",
                expected=f"those of {part.class_name} with {part.folder / 'config.json'}",
            )
    module.load_state_dict(tensors, strict=True, assign=True)


def _clip_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under this transformers version's names: with or without the prefix, without the position ids."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    prefix = "text_model."
    prefixed = any(name.startswith(prefix) for name in expected)
    if prefixed == any(name.startswith(prefix) for name in kept):
        return kept
    return {prefix + name if prefixed else name.removeprefix(prefix): tensor for name, tensor in kept.items()}


def _modern_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    stem, _, last = name.rpartition(".")
    head, _, layer = stem.rpartition(".")
    return f"{head}.{_OLD_ATTENTION[layer]}.{last}" if layer in _OLD_ATTENTION else name


def _full_config(resolved: Mapping[str, Any], part: Part) -> dict[str, Any]:
    public = {key: value for key, value in resolved.items() if not key.startswith("_")}
    return {**public, **part.config}


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _float(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _unusable(part: Part, error: Exception) -> CheckpointError:
    first = (str(error) or type(error).__name__).strip().splitlines()[0]
    return CheckpointError(
        str(part.folder / "config.json"),
        f"{part.class_name} cannot be built from it ({first})",
        remedy="Check its values.",
    )
