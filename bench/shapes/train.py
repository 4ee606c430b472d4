"""Train the shapes family from nothing: `python -m tandemrt.bench.shapes.train` at the root.

Each stage leaves one fp32 safetensors file in the work directory and is skipped when that file is there, so an
interrupted training goes on where it was. The last stage writes the fp16 family to the output directory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tandemrt.runtime import ArgumentError

from ..program import run_program
from . import family
from .inheritance import inherit
from .learning import Data, Ema, cosine, picture_loss, ready_to_train, sample, tokens_of
from .publishing import LOG, publish, read_log, read_published, require_family
from .scenes import scenes

SEED = 20260101
STAGES = ("vae_tiny", "large", "small", "one_step", "vae_kl", "vae_small")


@dataclass(frozen=True)
class Budget:
    """How much of everything; the defaults are those of the published weights."""

    pool: int = 60_000
    vae_tiny: int = 6_500
    large_even: int = 1_800
    large_weighted: int = 1_500
    small: int = 2_600
    pairs: int = 32_768
    one_step: int = 4_000
    vae_kl: int = 2_400
    vae_small: int = 3_000


class Trainer:
    """Runs the stages in order and writes one line of JSON per hundred steps."""

    def __init__(self, work: Path, budget: Budget) -> None:
        self.work, self._budget = work, budget
        work.mkdir(parents=True, exist_ok=True)
        self._require_same_budget()
        captions = (scene.caption for scene in scenes(SEED, 4_000, "train"))
        self.tokenizer = family.train_tokenizer(captions, work / "tokenizer")
        self._schedule = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        self._alphas_cumprod = (1 - self._schedule).cumprod(0).float()

    @cached_property
    def data(self) -> Data:
        return Data(SEED, self._budget.pool, self.tokenizer)

    @cached_property
    def latents(self) -> Tensor:
        """Latents of the whole pool under the tiny VAE's encoder: (pool, 4, 8, 8) float32."""
        vae = self.load("vae_tiny", family.tiny_vae())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [vae.encode(part.float() / 127.5 - 1).latents.float() for part in self.data.pictures.split(256)]
        return torch.cat(parts)

    def run(self, stage: str) -> None:
        """Train `stage` unless its file exists."""
        if self._file(stage).exists():
            return
        torch.manual_seed(SEED + STAGES.index(stage))
        started = time.monotonic()
        getattr(self, f"_train_{stage}")()
        self._log(stage=stage, done=True, seconds=round(time.monotonic() - started))

    def adopt(self, stage: str, published: Path) -> None:
        """Take a stage's weights and what was logged of it from a published family instead of training it."""
        if self._file(stage).exists():
            return
        self._write(stage, read_published(stage, published))
        for facts in read_log(stage, published):
            self._log(**facts)

    def load(self, stage: str, module: nn.Module, prefix: str = "") -> nn.Module:
        """Fill `module` with a finished stage's weights and freeze it."""
        state = load_file(self._file(stage))
        module.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
        return module.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def _file(self, stage: str) -> Path:
        return self.work / f"{stage}.safetensors"

    def _save(self, stage: str, **modules: nn.Module) -> None:
        state = {
            f"{prefix}{name}": value.contiguous()
            for prefix, module in modules.items()
            for name, value in module.state_dict().items()
        }
        self._write(stage, state)

    def _write(self, stage: str, tensors: dict[str, Tensor]) -> None:
        part = self._file(stage).with_suffix(".part")
        save_file(tensors, part)
        part.rename(self._file(stage))

    def _require_same_budget(self) -> None:
        """Refuse to go on from stages that had another budget."""
        file, budget = self.work / "budget.json", asdict(self._budget)
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != budget:
            raise ArgumentError(
                "--work", "stages trained with another budget", got=str(self.work), remedy="Give another folder."
            )
        file.write_text(json.dumps(budget), encoding="utf-8")

    def _log(self, **facts: object) -> None:
        line = json.dumps(facts)
        print(line, flush=True)
        with (self.work / LOG).open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _optimize(
        self, stage: str, modules: list[nn.Module], losses: Iterator[Tensor], rate: Callable[[int], float]
    ) -> None:
        """Take one AdamW step per loss, average the weights, and leave the average in the modules."""
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate(0), weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
        ema, recent, started = Ema(*modules), [], time.monotonic()
        for step, loss in enumerate(losses):
            optimizer.param_groups[0]["lr"] = rate(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            recent.append(loss.item())
            if step % 100 == 99:
                mean = round(float(np.mean(recent)), 5)
                self._log(stage=stage, step=step + 1, loss=mean, seconds=round(time.monotonic() - started))
                recent.clear()
        ema.copy_to_modules()

    # The autoencoders

    def _train_vae_tiny(self) -> None:
        vae = family.tiny_vae().to(memory_format=torch.channels_last)

        def losses() -> Iterator[Tensor]:
            for pictures in self.data.picture_batches(16, self._budget.vae_tiny, seed=1):
                with torch.autocast("cpu", torch.bfloat16):
                    latents = vae.encode(pictures).latents.float()
                    decoded = vae.decode(latents + 0.08 * torch.randn_like(latents)).sample.float()
                spread = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
                yield picture_loss(decoded, pictures) + 0.02 * spread

        self._optimize("vae_tiny", [vae], losses(), cosine(2e-3, self._budget.vae_tiny))
        self._save("vae_tiny", **{"": vae})

    def _train_vae_kl(self) -> None:
        """The baseline learns to encode into the tiny VAE's latents and to decode them."""
        vae = family.kl_vae().to(memory_format=torch.channels_last)
        space = self.load("vae_tiny", family.tiny_vae())

        def losses() -> Iterator[Tensor]:
            for pictures in self.data.picture_batches(16, self._budget.vae_kl, seed=2):
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        latents = space.encode(pictures).latents.float()
                    posterior = vae.encode(pictures).latent_dist
                    decoded = vae.decode(latents + 0.08 * torch.randn_like(latents)).sample.float()
                encoding = (posterior.mean.float() - latents).square().mean()
                spread = (posterior.logvar.float() + 6).square().mean()
                yield picture_loss(decoded, pictures) + 0.5 * encoding + 0.001 * spread

        self._optimize("vae_kl", [vae], losses(), cosine(2e-3, self._budget.vae_kl))
        self._save("vae_kl", **{"": vae})

    def _train_vae_small(self) -> None:
        """The small VAE keeps the baseline's encoder and learns a narrower decoder."""
        vae = family.small_vae().to(memory_format=torch.channels_last)
        baseline = self.load("vae_kl", family.kl_vae())
        vae.encoder.load_state_dict(baseline.encoder.state_dict())
        vae.quant_conv.load_state_dict(baseline.quant_conv.state_dict())
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

        def losses() -> Iterator[Tensor]:
            for pictures in self.data.picture_batches(16, self._budget.vae_small, seed=3):
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        latents = baseline.encode(pictures).latent_dist.mean.float()
                    decoded = vae.decode(latents + 0.08 * torch.randn_like(latents)).sample.float()
                yield picture_loss(decoded, pictures)

        self._optimize("vae_small", [vae], losses(), cosine(2e-3, self._budget.vae_small))
        self._save("vae_small", **{"": vae})

    # The denoisers

    def _noised(self, steps: int, seed: int, late: Callable[[int], bool]) -> Iterator[tuple[Tensor, ...]]:
        """Batches of 128: noisy latents, time steps, noise, tokens (one in ten empty) and the loss weight.

        From the steps that `late` names on, 35% of the time steps lie in 600-999, where the layout is decided, and
        the weight is min(1 / alphas_cumprod, 40) / 4; before, both are even.
        """
        generator = torch.Generator().manual_seed(seed)
        empty = tokens_of(self.tokenizer, [""])[0]
        for step in range(steps):
            index = torch.randint(len(self.latents), (128,), generator=generator)
            timesteps = torch.randint(1000, (128,), generator=generator)
            weight = torch.ones(128)
            if late(step):
                timesteps[:45] = torch.randint(600, 1000, (45,), generator=generator)
                weight = (1 / self._alphas_cumprod[timesteps]).clamp(max=40) / 4
            clean, tokens = self.latents[index], self.data.tokens[index].clone()
            tokens[torch.rand(128, generator=generator) < 0.1] = empty
            noise = torch.randn(clean.shape, generator=generator)
            signal = self._alphas_cumprod[timesteps][:, None, None, None]
            noisy = (signal.sqrt() * clean + (1 - signal).sqrt() * noise).contiguous(memory_format=torch.channels_last)
            yield noisy, timesteps, noise, tokens, weight[:, None, None, None]

    def _train_large(self) -> None:
        even, total = self._budget.large_even, self._budget.large_even + self._budget.large_weighted
        unet = ready_to_train(family.large_unet())
        text = family.text_encoder(self.tokenizer).train()

        def losses() -> Iterator[Tensor]:
            for noisy, timesteps, noise, tokens, weight in self._noised(total, 11, lambda step: step >= even):
                with torch.autocast("cpu", torch.bfloat16):
                    predicted = unet(noisy, timesteps, text(tokens).last_hidden_state).sample.float()
                yield (weight * (predicted - noise).square()).mean()

        second = cosine(8e-4, total - even)
        self._optimize(
            "large", [unet, text], losses(), lambda n: min(1e-3, 1e-5 * (n + 1)) if n < even else second(n - even)
        )
        self._save("large", **{"unet.": unet, "text_encoder.": text})

    def _teacher(self) -> tuple[nn.Module, nn.Module]:
        unet = ready_to_train(self.load("large", family.large_unet(), "unet.")).eval()
        return unet, self.load("large", family.text_encoder(self.tokenizer), "text_encoder.")

    def _train_small(self) -> None:
        """Output distillation from the large UNet with the noise loss beside it."""
        teacher, text = self._teacher()
        unet = ready_to_train(family.pruned_unet(family.SMALL_PRUNING))
        inherit(unet, teacher)

        def losses() -> Iterator[Tensor]:
            for noisy, timesteps, noise, tokens, weight in self._noised(self._budget.small, 12, lambda _: True):
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        hidden = text(tokens).last_hidden_state
                        wanted = teacher(noisy, timesteps, hidden).sample.float()
                    predicted = unet(noisy, timesteps, hidden).sample.float()
                yield (weight * ((predicted - wanted).square() + 0.3 * (predicted - noise).square())).mean()

        self._optimize("small", [unet], losses(), cosine(1.5e-3, self._budget.small))
        self._save("small", **{"": unet})

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, the large model's picture of it in 8 steps at guidance 2, and the prompt's tokens, made once."""
        file = self._file("pairs")
        if not file.exists():
            teacher, text = self._teacher()
            generator = torch.Generator().manual_seed(13)
            chosen = torch.randint(self._budget.pool, (self._budget.pairs,), generator=generator)
            tokens = self.data.tokens[chosen]
            noise = torch.randn((len(tokens), 4, 8, 8), generator=generator)
            started, parts = time.monotonic(), []
            for part_noise, part_tokens in zip(noise.split(256), tokens.split(256), strict=True):
                parts.append(sample(teacher, text, part_noise, part_tokens, self.tokenizer, steps=8))
                if len(parts) % 16 == 0:
                    self._log(stage="one_step", pairs=len(parts) * 256, seconds=round(time.monotonic() - started))
            self._write("pairs", {"noise": noise, "latents": torch.cat(parts).contiguous(), "tokens": tokens})
        pairs = load_file(file)
        return pairs["noise"], pairs["latents"], pairs["tokens"]

    def _train_one_step(self) -> None:
        """From noise at t = 999 straight to the large model's latent, by SDXS's formula for x0."""
        noise, latents, tokens = self._pairs()
        teacher, text = self._teacher()
        unet = ready_to_train(family.pruned_unet(family.ONE_STEP_PRUNING))
        inherit(unet, teacher)
        with torch.no_grad():
            hidden = torch.cat([text(part).last_hidden_state for part in tokens.split(512)])
        generator = torch.Generator().manual_seed(14)
        signal = self._alphas_cumprod[999]
        last = torch.full((128,), 999)

        def losses() -> Iterator[Tensor]:
            for _ in range(self._budget.one_step):
                index = torch.randint(len(noise), (128,), generator=generator)
                start = noise[index].contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    predicted = unet(start, last, hidden[index]).sample.float()
                denoised = (start - (1 - signal).sqrt() * predicted) / signal.sqrt()
                yield F.mse_loss(denoised, latents[index]) + 0.2 * F.l1_loss(denoised, latents[index])

        self._optimize("one_step", [unet], losses(), cosine(1e-3, self._budget.one_step))
        self._save("one_step", **{"": unet})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/shapes-training"), help="where stages keep their state")
    parser.add_argument("--out", type=Path, default=Path("bench/shapes/weights"), help="where the family goes")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, metavar="STAGE", help="train these stages; take the others from --out"
    )
    parser.add_argument("--rehearse", action="store_true", help="a few steps of everything, into out/shapes-rehearsal")
    arguments = parser.parse_args()
    budget, work, out = Budget(), arguments.work, arguments.out
    if arguments.rehearse:
        budget = Budget(512, 20, 10, 10, 20, 256, 20, 20, 20)
        work, out = Path("out/shapes-rehearsal/work"), Path("out/shapes-rehearsal/weights")
    require_family(out)
    trainer = Trainer(work, budget)
    for stage in STAGES:
        if arguments.only and stage not in arguments.only:
            trainer.adopt(stage, arguments.out)
        else:
            trainer.run(stage)
    publish(trainer, out)


if __name__ == "__main__":
    run_program(main)
