"""What was made of a component's graph before it was compiled: LoRA slots, a step engine, a stage of a denoiser."""

from __future__ import annotations

from typing import Literal

from .manifest import Frozen

MAX_LORA_SLOTS, MAX_LORA_RANK = 16, 1024


class Variant(Frozen, frozen=True, kw_only=True):
    """How a graph differs from the bundle's own; by default in nothing.

    lora_slots, lora_rank: how many LoRAs of up to which rank it takes as inputs; see `runtime.lora_slots`.
    step: for a step engine, whether it runs both branches of guidance, or that it is the update alone, without the
        denoiser; see `runtime.step_row`.
    timesteps: those built into a step engine, which then takes no others.
    stage: which stage of how many it is, from 0 on; see `runtime.stages`. cuts: the blocks that stages begin with, but
        for the first; stages work together that have the same.
    """

    lora_slots: int = 0
    lora_rank: int = 0
    step: Literal["guided", "unguided", "update"] | None = None
    timesteps: tuple[float, ...] = ()
    stage: tuple[int, int] | None = None
    cuts: tuple[str, ...] = ()

    def serves(self, wanted: Variant) -> bool:
        """Whether this is what is wanted, or more: room for more LoRAs of larger ranks, further time steps.

        wanted: its `timesteps` are those a step engine must run. A graph without LoRAs wants one without slots, which
            costs nothing. One with a stage and no `cuts` wants it of any cut.
        """
        if self.stage != wanted.stage or (wanted.cuts and self.cuts != wanted.cuts):
            return False
        if self.step != wanted.step or bool(self.lora_slots) != bool(wanted.lora_slots):
            return False
        enough = self.lora_slots >= wanted.lora_slots and self.lora_rank >= wanted.lora_rank
        return enough and (not self.timesteps or set(wanted.timesteps) <= set(self.timesteps))

    @property
    def cost(self) -> tuple[int, bool]:
        """What orders variants that serve alike, the cheapest first."""
        return self.lora_slots * self.lora_rank, not self.timesteps

    @property
    def step_kind(self) -> str:
        """What errors call a step engine, `step` or `update`."""
        return "update" if self.step == "update" else "step"

    @property
    def options(self) -> str:
        """What `tandemrt build-engine` is told to make it, each option after a space; nothing for an update engine."""
        slots = f" --lora-slots {self.lora_slots} --lora-rank {self.lora_rank}" if self.lora_slots else ""
        stages = f" --stages {self.stage[1]}" if self.stage else ""
        folded = f" --fold-steps {len(self.timesteps)}" if self.timesteps else ""
        step = " --step" if self.step in ("guided", "unguided") else ""
        return slots + step + folded + stages

    def told(self, *, refitted: bool) -> str:
        """It as what ran, perhaps with LoRAs in its weights."""
        parts = () if refitted and self == PLAIN else (str(self),)
        return ", ".join((*parts, "refitted") if refitted else parts)

    def __str__(self) -> str:
        slots = f"{self.lora_slots} LoRA slot{'s' * (self.lora_slots > 1)} of rank {self.lora_rank}"
        parts = (
            slots if self.lora_slots else "",
            ("update" if self.step == "update" else f"{self.step} step") if self.step else "",
            f"{len(self.timesteps)} time step{'s' * (len(self.timesteps) > 1)} built in" if self.timesteps else "",
            f"stage {self.stage[0] + 1} of {self.stage[1]}" if self.stage else "",
        )
        return ", ".join(filter(None, parts)) or "plain"


PLAIN, UPDATE = Variant(), Variant(step="update")
