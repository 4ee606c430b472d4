"""Denoisers as graphs: stock or pruned UNets, and SD3's transformer."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from ..runtime.manifest import TensorSpec
from ..runtime.tensors import TAKEN
from .checkpoint import Part
from .facts import TIME_IDS, DenoiserFacts, Residual, denoiser_facts
from .lazy import parameters_on_meta, stored_tensors
from .modules import UNUSABLE, Graph, fill, float_spec, frozen, full_config, unusable
from .pruned import resize_inner_widths

# Pooled text is a UNet's argument within a dictionary.
_ADDED = ("text_embeds", "time_ids")


class _UNet(nn.Module):
    """A UNet whose conditioning beside the text is given by position, in the order of `names`."""

    def __init__(self, unet: UNet2DConditionModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.unet = unet
        self._names = names

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor) -> Tensor:
        given = dict(zip(self._names, more, strict=True))
        added = {name: given.pop(name) for name in _ADDED if name in given}
        mid = given.pop(TAKEN.mid, None)
        down = tuple(given.pop(name) for name in self._names if name.startswith(TAKEN.down))
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            added_cond_kwargs=added or None,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=mid,
            return_dict=False,
            **given,
        )[0]


class _Transformer(nn.Module):
    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        text, pooled = encoder_hidden_states, pooled_projections
        return self.transformer(hidden_states, text, pooled, timestep, return_dict=False)[0]


def denoiser_graph(part: Part, *, controlled: bool = False) -> Graph:
    """A denoiser: its inputs, all float32, are those of `UNet2DConditionModel` or of `SD3Transformer2DModel`.

    UNet: sample (B, C, H, W), timestep (B,) or (1,), encoder_hidden_states (B, sequence, D); where it has them
    text_embeds (B, P), time_ids (B, 6) and timestep_cond (B, E); where it is `controlled`, what ControlNets add to its
    skip connections and middle, down_block_additional_residual_N and mid_block_additional_residual. Its inner widths
    are those of the tensors. → out_sample (B, C, H, W).
    Transformer: hidden_states (B, C, H, W), timestep (B,), encoder_hidden_states (B, sequence, D), pooled_projections
    (B, P) → out_hidden_states (B, C, H, W).
    """
    facts = denoiser_facts(part)
    if part.class_name == "SD3Transformer2DModel":
        return _transformer_graph(part, facts)
    more = (*unet_conditioning(facts), *(_residual_inputs(facts) if controlled else ()))
    return _unet_graph(part, facts, more)


def shared_inputs(latent: str, facts: DenoiserFacts) -> tuple[TensorSpec, ...]:
    """What every denoiser and ControlNet takes, its latent under the name given."""
    return (
        float_spec(latent, "batch", facts.in_channels, "height", "width"),
        # Not "batch": optimum gives one time step for all rows, and ONNX Runtime reuses memory by symbols.
        float_spec("timestep", "steps"),
        float_spec("encoder_hidden_states", "batch", "sequence", facts.text_width),
    )


def unet_conditioning(facts: DenoiserFacts) -> tuple[TensorSpec, ...]:
    """What a UNet or a ControlNet takes beside the text, as its configuration says."""
    pooled = (
        float_spec("text_embeds", "batch", facts.pooled_width),
        float_spec("time_ids", "batch", TIME_IDS),
    )
    guidance = (float_spec("timestep_cond", "batch", facts.guidance_width),)
    return (*(pooled if facts.pooled_width else ()), *(guidance if facts.guidance_width else ()))


def residual_spec(name: str, residual: Residual) -> TensorSpec:
    """A tensor of a skip connection's shape."""
    channels, factor = residual
    sides = ("height", "width") if factor == 1 else (f"height // {factor}", f"width // {factor}")
    return float_spec(name, "batch", channels, *sides)


def _unet_graph(part: Part, facts: DenoiserFacts, more: tuple[TensorSpec, ...]) -> Graph:
    tensors = stored_tensors(part.weights)
    try:
        with parameters_on_meta():
            unet = UNet2DConditionModel.from_config(dict(part.config))
            resize_inner_widths(unet, part.weights.shapes)
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(unet, tensors, part)
    return Graph(
        role="denoiser",
        module=frozen(_UNet(unet, tuple(spec.name for spec in more))),
        inputs=(*shared_inputs("sample", facts), *more),
        outputs=(float_spec("out_sample", "batch", facts.out_channels, "height", "width"),),
        config=full_config(unet.config, part),
        multiple=facts.multiple,
    )


def _transformer_graph(part: Part, facts: DenoiserFacts) -> Graph:
    tensors = stored_tensors(part.weights)
    try:
        with parameters_on_meta():
            transformer = SD3Transformer2DModel.from_config(dict(part.config))
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(transformer, tensors, part)
    return Graph(
        role="denoiser",
        module=frozen(_Transformer(transformer)),
        inputs=(
            *shared_inputs("hidden_states", facts),
            float_spec("pooled_projections", "batch", facts.pooled_width),
        ),
        outputs=(float_spec("out_hidden_states", "batch", facts.out_channels, "height", "width"),),
        config=full_config(transformer.config, part),
        multiple=facts.multiple,
    )


def _residual_inputs(facts: DenoiserFacts) -> tuple[TensorSpec, ...]:
    *down, mid = facts.residuals
    names = (f"{TAKEN.down}{index}" for index in range(len(down)))
    return *map(residual_spec, names, down), residual_spec(TAKEN.mid, mid)
