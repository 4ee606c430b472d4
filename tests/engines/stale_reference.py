"""Hybridiff's stale pipeline on diffusers' modules: every worker with its own caches, as AsyncDiff has them.

Sources: czg1225/AsyncDiff (`asyncdiff/async_sd.py`: which modules run where and when, what is exchanged, which time
step) and kaist-dmlab/Hybridiff (`hybridiff/hybrid_sd.py` and its pipelines: the taus, which text). Two things differ.
Caches are exchanged before the first stale step whatever the stride: there, with a stride of 2, each worker would begin
on activations of its own text. Of SD3's blocks all are exchanged: there, Hybridiff takes the block behind the cut for
the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tandemrt.runtime.discrepancy import Taus
from tandemrt.runtime.stage_work import Pipelining

UNITS = re.compile(
    r"conv_in|conv_norm_out|conv_out|norm_out|proj_out|transformer_blocks\.\d+"
    r"|.+\.(?:resnets|downsamplers|upsamplers)\.\d+|.+\.attentions\.\d+\.(?:norm|proj_in|proj_out|transformer_blocks\.\d+)"
)
Branch = Mapping[str, Tensor]


def predicted(denoiser: Any, latent: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
    """A denoiser's prediction for one branch; its conditioning goes by the names that graphs have for it."""
    if "pooled_projections" in branch:
        return denoiser(latent, timestep=timestep.expand(len(latent)), return_dict=False, **branch)[0]
    added = {name: branch[name] for name in ("text_embeds", "time_ids") if name in branch}
    text = branch["encoder_hidden_states"]
    return denoiser(latent, timestep, text, added_cond_kwargs=added or None, return_dict=False)[0]


class Units:
    """A denoiser's modules, each of which can be told to give what it is handed instead of running.

    stage_of: each module's stage, in the order they run. made: the results of the last call, by module.
    """

    def __init__(self, denoiser: nn.Module, latent: Tensor, branch: Branch, cuts: Sequence[str]) -> None:
        self.denoiser, self.stage_of, self.made = denoiser, dict[str, int](), dict[str, Any]()
        self._runs: int | None = None
        self._handed: Mapping[str, Any] = {}
        for name, module in denoiser.named_modules():
            if UNITS.fullmatch(name):
                module.forward = self._patched(name, module.forward)
        self.run(latent, torch.tensor(500.0), branch)
        waiting = list(cuts)
        for name in self.made:
            if waiting and f"{name}.".startswith(f"{waiting[0]}."):
                waiting.pop(0)
            self.stage_of[name] = len(cuts) - len(waiting)
        assert not waiting

    def run(self, latent: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
        """A call in which every module runs."""
        return self.run_stage(None, {}, latent, timestep, branch)

    def run_stage(
        self, stage: int | None, handed: Mapping[str, Any], latent: Tensor, timestep: Tensor, branch: Branch
    ) -> Tensor:
        """A call in which the modules of one stage run, none where it is −1; the others give what is handed."""
        self._runs, self._handed, self.made = stage, handed, {}
        return predicted(self.denoiser, latent, timestep, branch)

    def _patched(self, name: str, forward: Any) -> Any:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if self._runs is None or self._runs == self.stage_of[name]:
                self.made[name] = forward(*args, **kwargs)
                return self.made[name]
            return self._handed[name]

        return patched


@dataclass
class _Worker:
    """A worker of the pipeline: which stage it runs under which text, whether others read its caches, its caches."""

    stage: int
    branch: Branch
    read: bool
    cached: dict[str, Any]


class Reference:
    """A run: predictions step by step, by the scheduler's own arithmetic."""

    def __init__(
        self, units: Units, branches: tuple[Branch, Branch], pipelining: Pipelining, taus: Taus, guidance_scale: float
    ) -> None:
        self._units, self._branches, self._pipelining, self._taus = units, branches, pipelining, taus
        self._guidance_scale = guidance_scale
        count, world = pipelining.stages, pipelining.stages + pipelining.stride - 1
        self._workers = [
            _Worker(min(rank, count - 1), branches[int(rank >= world // 2)], rank < count, {}) for rank in range(world)
        ]
        self.log: list[float] = []
        self.tau1: int | None = None
        self.first: int | None = None

    @torch.no_grad()
    def steps(self, scheduler: Any, latent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each step's prediction and the latent behind it."""
        times = scheduler.timesteps
        for step, timestep in enumerate(times):
            window = self.tau1 is not None and self.first <= step <= self.tau1 + self._taus.k
            prediction = self._stale(step, latent, times) if window else self._guided(step, latent, timestep)
            latent = scheduler.step(prediction, timestep, latent, return_dict=False)[0]
            yield prediction, latent

    def _guided(self, step: int, latent: Tensor, timestep: Tensor) -> Tensor:
        without, given = (self._units.run(latent, timestep, branch) for branch in self._branches)
        log, taus = self.log, self._taus
        log.append(((given - without).abs().mean() / (without.abs().mean() + 1e-12)).item())
        if self.tau1 is None and len(log) > taus.l_slope:
            slope = (log[-taus.l_slope] - log[-1]) / taus.l_slope
            if 0 <= slope < taus.eps_slope:
                self.tau1, self.first = step, step + 1
        if self.tau1 is None and step >= taus.tau_cap - 1:
            self.tau1, self.first = taus.tau_cap, step + 1
        return without + self._guidance_scale * (given - without)

    def _stale(self, step: int, latent: Tensor, times: Tensor) -> Tensor:
        stride, count, shift = self._pipelining.stride, self._pipelining.stages, int(self._pipelining.time_shift)
        infer_step = step - (self.first or 0)
        samples = []
        if infer_step == 0:
            for worker in self._workers:
                samples.append(self._units.run(latent, times[step], worker.branch))
                worker.cached = dict(self._units.made)
            self._exchange()
            return samples[count - 1]
        if stride == 1 or (infer_step - 1) % 2 == 1:
            self._exchange()
        runs = (infer_step - 1) % stride == 0
        for rank, worker in enumerate(self._workers):
            time = step - shift
            if stride == 2 and rank < count and runs and step < len(times) - 1:
                time += 1
            stage = worker.stage if runs else -1
            samples.append(self._units.run_stage(stage, worker.cached, latent, times[time], worker.branch))
            if worker.read:
                worker.cached |= self._units.made
        return samples[-1 if stride == 2 and runs else count - 1]

    def _exchange(self) -> None:
        for name, stage in self._units.stage_of.items():
            for worker in self._workers:
                worker.cached[name] = self._workers[stage].cached[name]
