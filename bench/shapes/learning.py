"""What the stages of training share: data, averaged weights, losses, rates and the teacher's sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import family
from .accuracy import GUIDANCE_SCALE
from .scenes import render, scenes


class Data:
    """Rendered training scenes, made once and kept in memory."""

    def __init__(self, seed: int, count: int, tokenizer: CLIPTokenizer) -> None:
        self._scenes = scenes(seed, count, "train")
        self.pictures = torch.from_numpy(np.stack([render(scene) for scene in self._scenes])).permute(0, 3, 1, 2)
        self._tokenizer = tokenizer

    @cached_property
    def tokens(self) -> Tensor:
        """Caption tokens: (pool, 24) int64."""
        return tokens_of(self._tokenizer, [scene.caption for scene in self._scenes])

    def picture_batches(self, size: int, steps: int, seed: int) -> Iterator[Tensor]:
        """Pictures in [-1, 1]: (size, 3, 64, 64) float32, channels last."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            index = torch.randint(len(self.pictures), (size,), generator=generator)
            yield (self.pictures[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Ema:
    """An exponential moving average of a module's parameters."""

    def __init__(self, *modules: nn.Module, decay: float = 0.999) -> None:
        self._live = [parameter for module in modules for parameter in module.parameters()]
        self._mean = [parameter.detach().clone() for parameter in self._live]
        self._decay, self._updates = decay, 0

    def update(self) -> None:
        self._updates += 1
        weight = 1 - min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._mean, [p.detach() for p in self._live], weight)

    def copy_to_modules(self) -> None:
        with torch.no_grad():
            for live, mean in zip(self._live, self._mean, strict=True):
                live.copy_(mean)


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded token ids: (len(captions), 24) int64."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=family.TEXT_LENGTH)
    return torch.tensor(encoded["input_ids"])


def picture_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1, squared error and the L1 of the horizontal and vertical differences."""
    difference = decoded - pictures
    gradients = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * gradients


def cosine(peak: float, steps: int) -> Callable[[int], float]:
    """A learning rate that warms up over 100 steps and falls to 1% of `peak`."""
    return lambda n: peak * min(1.0, (n + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(n / steps, 1.0))))


def ready_to_train(unet: nn.Module) -> nn.Module:
    """The memory layout and attention that are fastest on CPUs; the last convolution stays in fp32."""
    unet.set_attn_processor(AttnProcessor())
    forward = unet.conv_out.forward

    def forward_fp32(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(hidden.float())

    unet.conv_out.forward = forward_fp32
    return unet.train().to(memory_format=torch.channels_last)


@torch.no_grad()
def sample(
    unet: nn.Module, text: CLIPTextModel, noise: Tensor, tokens: Tensor, tokenizer: CLIPTokenizer, steps: int
) -> Tensor:
    """DPM-Solver++ 2M at guidance 2 from `noise` (B, 4, 8, 8): latents of the same shape, float32."""
    scheduler = family.scheduler()
    scheduler.set_timesteps(steps)
    empty = tokens_of(tokenizer, [""]).expand(len(tokens), -1)
    latents = noise.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = text(torch.cat([empty, tokens])).last_hidden_state
        for timestep in scheduler.timesteps:
            both = unet(torch.cat([latents, latents]), timestep, hidden).sample.float()
            unconditional, conditional = both.chunk(2)
            guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents
