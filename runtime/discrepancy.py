"""How far guidance's two branches are apart, step by step, and when Hybridiff's pipeline takes over therefore.

Source: kaist-dmlab/Hybridiff, `hybridiff/pipelines/pipeline_stable_diffusion_xl.py` and `hybrid_sd.py` (CVPR 2026).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
import numpy.typing as npt

from .errors import PlanError
from .manifest import TensorSpec
from .tensors import spec_of

_TINY = 1e-12
# What a step is run as: both branches whole; the first of the window, whole too, which fills what stages hand on; or
# the stages at once on what was handed on a step before.
Phase = Literal["branches", "fill", "pipelined"]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Taus:
    """When the window begins and ends; checked where it is made.

    l_slope: over how many steps the log's slope is taken. eps_slope: below which slope the branches have settled.
    k: how many steps behind tau1 tau2 lies. tau_cap: tau1 at the latest.

    Raises:
        PlanError: a value out of range.
    """

    l_slope: int = 12
    eps_slope: float = 4e-4
    k: int = 5
    tau_cap: int = 15

    def __post_init__(self) -> None:
        for name, value in (("L_slope", self.l_slope), ("k", self.k), ("tau_cap", self.tau_cap)):
            if value < 1:
                raise PlanError(f"placement_config: {name}", "out of range", got=value, expected="1 or more")
        if not (isfinite(self.eps_slope) and self.eps_slope > 0):
            expected = "a number above 0"
            raise PlanError("placement_config: eps_slope", "out of range", got=self.eps_slope, expected=expected)

    def check_steps(self, steps: int) -> None:
        """Raise PlanError when the window could end behind the last of `steps` steps."""
        if self.tau_cap + self.k >= steps:
            raise PlanError(
                "placement_config: tau_cap + k",
                f"the window's last step, of {steps} from 0 on",
                got=self.tau_cap + self.k,
                expected=f"at most {steps - 1}",
                remedy="Take more steps, or lower tau_cap or k in the request's placement_config.",
            )


UNET = Taus()
TRANSFORMER = Taus(l_slope=15, eps_slope=5e-4, k=5, tau_cap=40)


def default_taus(inputs: Iterable[TensorSpec]) -> Taus:
    """Hybridiff's own for a denoiser of these inputs: SD3's for a transformer, SDXL's for a UNet; both for 50 steps."""
    return UNET if spec_of(inputs, "hidden_states") is None else TRANSFORMER


def relative_mae(conditional: Array, unconditional: Array, scratch: Array) -> float:
    """mean|ε_c − ε_u| / (mean|ε_u| + 1e-12), over all pictures of a batch together; `scratch` is of their shape."""
    size = float(np.abs(unconditional, out=scratch).mean())
    np.subtract(conditional, unconditional, out=scratch)
    return relative_mean(float(np.abs(scratch, out=scratch).mean()), size)


def relative_mean(apart: float, size: float) -> float:
    """The same of mean|ε_c − ε_u| and mean|ε_u|."""
    return apart / (size + _TINY)


class Discrepancy:
    """The log of a run and what follows from it. One run's.

    found: tau1 and tau2, None until they are known. steps: the window's, from the one behind that which decided to
        tau2; none until they are known.
    """

    def __init__(self, taus: Taus, steps: int) -> None:
        """Raises PlanError where the window could end behind the last step."""
        taus.check_steps(steps)
        self.taus = taus
        self.found: tuple[int, int] | None = None
        self.steps = range(0)
        self._recorded = np.zeros(steps)
        self._count = 0

    def record(self, step: int, value: float) -> None:
        """Note the `relative_mae` of a step with both branches; call it in order. It may decide tau1 if that is open.

        tau1 is the first step at which the slope (m[n−l_slope] − m[n−1]) / l_slope of the n values so far, more than
        l_slope, lies in [0, eps_slope); where there is none by the step before tau_cap, it is tau_cap.
        """
        if self.found is not None:
            return
        self._recorded[self._count] = value
        self._count += 1
        count, taus = self._count, self.taus
        if count > taus.l_slope:
            slope = (self._recorded[count - taus.l_slope] - value) / taus.l_slope
            if 0 <= slope < taus.eps_slope:
                self._open(step, step)
                return
        if step >= taus.tau_cap - 1:
            self._open(step, taus.tau_cap)

    def phase(self, step: int) -> Phase:
        """What a step is run as, by what is known when it begins."""
        if step not in self.steps:
            return "branches"
        return "fill" if step == self.steps.start else "pipelined"

    def _open(self, decided: int, tau1: int) -> None:
        tau2 = tau1 + self.taus.k
        self.found, self.steps = (tau1, tau2), range(decided + 1, tau2 + 1)
