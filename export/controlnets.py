"""ControlNets as graphs, and the residuals by which they steer a UNet."""

from __future__ import annotations

from diffusers import ControlNetModel
from torch import Tensor, nn

from ..runtime.tensors import GIVEN
from .checkpoint import Part
from .denoisers import residual_spec, shared_inputs, unet_conditioning
from .facts import denoiser_facts
from .lazy import parameters_on_meta, stored_tensors
from .modules import UNUSABLE, Graph, fill, float_spec, frozen, full_config, unusable


class _ControlNet(nn.Module):
    """A ControlNet whose pooled text and sizes, where it has them, follow the picture and its scale."""

    def __init__(self, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: Tensor,
        *added: Tensor,
    ) -> tuple[Tensor, ...]:
        down, mid = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond,
            conditioning_scale,
            added_cond_kwargs=dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None,
            return_dict=False,
        )
        return *down, mid


def controlnet_graph(part: Part, downsampling: int) -> Graph:
    """A ControlNet, whose outputs a UNet adds to its skip connections and its middle.

    It takes a UNet's inputs, all float32, with controlnet_cond (B, 3, f·H, f·W) in 0..1 and conditioning_scale (1,),
    which its outputs are multiplied by: down_block_res_sample_N and mid_block_res_sample.
    `downsampling`: how many pixels a latent's stand for along a side, f.
    """
    facts = denoiser_facts(part)
    try:
        with parameters_on_meta():
            controlnet = ControlNetModel.from_config(dict(part.config))
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(controlnet, stored_tensors(part.weights), part)
    *down, mid = facts.residuals
    picture = ("batch", 3, f"{downsampling} * height", f"{downsampling} * width")
    return Graph(
        role="controlnet",
        module=frozen(_ControlNet(controlnet)),
        inputs=(
            *shared_inputs("sample", facts),
            float_spec("controlnet_cond", *picture),
            float_spec("conditioning_scale", 1),
            *unet_conditioning(facts),
        ),
        outputs=(
            *(residual_spec(f"{GIVEN.down}{index}", residual) for index, residual in enumerate(down)),
            residual_spec(GIVEN.mid, mid),
        ),
        config=full_config(controlnet.config, part),
        multiple=facts.multiple,
    )
