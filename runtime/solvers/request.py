"""What a solver is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request for a table.

    class_name: the diffusers scheduler class. config: all of its keys. steps: the number of inference steps.
    timesteps: explicit falling time steps, as many as steps. eta: DDIM's eta, TCD's gamma.
    """

    class_name: str
    config: Config
    steps: int
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
