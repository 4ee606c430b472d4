"""Solvers: a diffusers scheduler class and its configuration, compiled into a table.

Every solver is one pure function from a schedule to rows, and one line in `_CLASSES`. Call arguments of diffusers'
`step` beyond eta (s_churn, s_tmin, s_tmax, s_noise, use_clipped_model_output, LMS's order) are not covered, nor are
`set_timesteps`' sigmas, mu and strength.

Where a table knowingly differs from diffusers: coefficients are float64 throughout; noise that diffusers draws to
multiply it by 0 (only ever after the last noise that counts) is not drawn; `trailing` spacing never takes the stray
step at time step −1; UniPC's bh1 ends at σ = 0 with the denoised estimate, where diffusers computes 0 · ∞.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np

from ..arguments import finite_number, whole_number
from ..errors import PlanError
from ..table import Table
from . import config as _config
from .exploding import euler, euler_ancestral, flow_euler, heun, lms
from .forms import Row, table_from_rows
from .multistep import deis, dpmsolver_multistep, unipc
from .request import Request
from .sigmas import SigmaSchedule, exploding_schedule, flow_schedule, preserving_schedule
from .single_step import AlphaSchedule, ddim, ddpm, distilled_schedule, lcm, pndm, spaced_schedule, tcd

__all__ = ["SOLVERS", "Solver", "begin_at_strength", "compile_table", "resolve_solver"]

AnySchedule = TypeVar("AnySchedule", AlphaSchedule, SigmaSchedule)


@dataclass(frozen=True, slots=True)
class _Class(Generic[AnySchedule]):
    """How a scheduler class is compiled, and which arguments diffusers gives it.

    timesteps_from: the lowest explicit time step; None where `set_timesteps` takes none.
    """

    rows: Callable[[AnySchedule], Iterator[Row]]
    schedule: Callable[[Request], AnySchedule]
    timesteps_from: int | None = None
    takes_eta: bool = False


_CLASSES: Mapping[str, _Class[Any]] = {
    "DDIMScheduler": _Class(ddim, spaced_schedule, takes_eta=True),
    "DDPMScheduler": _Class(ddpm, spaced_schedule, timesteps_from=0),
    "PNDMScheduler": _Class(pndm, spaced_schedule),
    "LCMScheduler": _Class(lcm, distilled_schedule, timesteps_from=0),
    "TCDScheduler": _Class(tcd, distilled_schedule, timesteps_from=0, takes_eta=True),
    "EulerDiscreteScheduler": _Class(euler, exploding_schedule, timesteps_from=0),
    "EulerAncestralDiscreteScheduler": _Class(euler_ancestral, exploding_schedule),
    "HeunDiscreteScheduler": _Class(heun, exploding_schedule, timesteps_from=0),
    "LMSDiscreteScheduler": _Class(lms, exploding_schedule),
    "DPMSolverMultistepScheduler": _Class(dpmsolver_multistep, preserving_schedule, timesteps_from=0),
    "DEISMultistepScheduler": _Class(deis, preserving_schedule),
    "UniPCMultistepScheduler": _Class(unipc, preserving_schedule),
    "FlowMatchEulerDiscreteScheduler": _Class(flow_euler, flow_schedule, timesteps_from=1),
}


@dataclass(frozen=True, slots=True)
class Solver:
    """What a short name stands for.

    config: keys the name decides. fallback: values for keys the base configuration leaves open and whose class default
        in diffusers does not work on latents.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    fallback: Mapping[str, Any] = field(default_factory=dict)


SOLVERS: Mapping[str, Solver] = {
    "ddim": Solver("DDIMScheduler", fallback={"clip_sample": False}),
    "ddpm": Solver("DDPMScheduler", fallback={"clip_sample": False}),
    "pndm": Solver("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": Solver("LCMScheduler"),
    "tcd": Solver("TCDScheduler"),
    "euler": Solver("EulerDiscreteScheduler"),
    "euler_a": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler"),
    "lms": Solver("LMSDiscreteScheduler"),
    "dpmsolver++": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++sde": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": Solver("DEISMultistepScheduler"),
    "unipc": Solver("UniPCMultistepScheduler"),
    "flow_euler": Solver("FlowMatchEulerDiscreteScheduler"),
}


def resolve_solver(
    name: str, base_config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """The scheduler class and configuration for a solver on a model whose own scheduler is `base_config`.

    Keys the class does not know are dropped, as diffusers' `from_config` drops them.

    name: one of SOLVERS, or a supported diffusers class.
    base_config: as in scheduler_config.json.
    overrides: keys asked for by hand. Unlike the base's, each must be known to the class.

    Raises:
        PlanError: the name is unknown; the base schedules a flow-matching model and the solver does not, or the other
            way round; an override the class does not know, or a base key that no scheduler knows.
    """
    if name not in SOLVERS and name not in _CLASSES:
        raise PlanError(
            "solver", "unknown", got=name, expected=f"one of {', '.join(SOLVERS)}, or a diffusers scheduler class"
        )
    solver = SOLVERS.get(name) or Solver(name)
    _require_same_process(name, solver.class_name, base_config)
    keys = _config.require_class(solver.class_name)
    for key, value in (overrides or {}).items():
        if key not in keys:
            expected = f"one of {', '.join(keys)}"
            raise PlanError(f"{solver.class_name}: {key}", "the class has no such key", got=value, expected=expected)
    base = _config.known_keys(solver.class_name, base_config)
    return solver.class_name, {**solver.fallback, **base, **solver.config, **(overrides or {})}


def compile_table(
    class_name: str,
    config: Mapping[str, Any],
    num_inference_steps: int | None,
    *,
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
    begin: int = 0,
) -> Table:
    """Compile a schedule: what diffusers' scheduler of this class and configuration would do, as a table.

    class_name: a diffusers scheduler class.
    config: as in scheduler_config.json; missing keys have the class's defaults, and keys that only other classes know
        are ignored as by `from_config`.
    num_inference_steps: 1..num_train_timesteps (LCM, TCD: ..original_inference_steps); may be None with `timesteps`.
    timesteps: falling training steps, for the classes whose `set_timesteps` takes them.
    eta: DDIM's eta or TCD's gamma, 0..1; 0 for all others.
    begin: the inference step to begin at, 0..num_inference_steps−1 (`begin_at_strength`). The table holds the steps
        from there on; what depends on the whole schedule stays, and there is no history before `begin`.

    Raises:
        PlanError: one of these does not hold, a key's value is not supported, or the schedule has no finite solution.
    """
    if class_name not in _CLASSES:
        raise PlanError("solver", "unknown scheduler class", got=class_name, expected=f"one of {', '.join(_CLASSES)}")
    compiled = _CLASSES[class_name]
    effective = _config.effective_config(class_name, config)
    request = Request(
        class_name=class_name,
        config=effective,
        steps=_checked_steps(num_inference_steps, timesteps, effective["num_train_timesteps"]),
        timesteps=_checked_timesteps(class_name, timesteps, effective),
        eta=_checked_eta(class_name, eta),
    )
    # A configuration that divides by zero is found in the table, and reported with the row it strikes.
    with np.errstate(all="ignore"):
        schedule = compiled.schedule(request)
        schedule = replace(schedule, begin=_checked_begin(begin, len(schedule.timesteps)))
        table = table_from_rows(class_name, compiled.rows(schedule), schedule.init_noise_sigma)
    asked = [class_name, effective, request.steps, request.timesteps, request.eta, schedule.begin]
    return replace(table, recipe=json.dumps(asked, sort_keys=True, default=float))


def begin_at_strength(class_name: str, num_inference_steps: int, strength: float) -> int:
    """The inference step at which image-to-image and inpainting begin; at strength 1 it is 0.

    As `get_timesteps` of diffusers' StableDiffusionImg2ImgPipeline (for every diffusion scheduler, LCM's and TCD's
    too, whose own `set_timesteps(strength=...)` would space other time steps) and, for flow matching, of its
    StableDiffusion3Img2ImgPipeline: the number of steps that run is num_inference_steps · strength, rounded down for
    the former and up for the latter.

    Raises:
        PlanError: strength is not in 0..1 or leaves no step, or num_inference_steps is no usable number.
    """
    share = finite_number(strength)
    if share is None or not 0 < share <= 1:
        raise PlanError("strength", "cannot be used", got=strength, expected="a number above 0 and up to 1")
    steps = _checked_steps(num_inference_steps, None, _config.MAX_TIMESTEPS)
    wanted = steps * share
    begin = int(steps - wanted) if _is_flow(class_name) else steps - int(wanted)
    if begin == steps:
        # One over the number of steps, rounded up: the product of 49 and 1/49 is less than 1.
        least = math.ceil(1e6 / steps) / 1e6
        raise PlanError(
            "strength",
            f"of {steps} steps, none is left",
            got=strength,
            expected=f"{least:g} or more",
            remedy="Raise strength, or ask for more steps.",
        )
    return begin


def _is_flow(class_name: str) -> bool:
    return class_name.startswith("FlowMatch")


def _require_same_process(name: str, class_name: str, base_config: Mapping[str, Any]) -> None:
    base_is_flow = "shift" in base_config or _is_flow(str(base_config.get("_class_name", "")))
    base_is_diffusion = "beta_schedule" in base_config
    if (base_is_flow and not _is_flow(class_name)) or (base_is_diffusion and _is_flow(class_name)):
        model = "a flow-matching" if base_is_flow else "a diffusion"
        expected = "flow_euler" if base_is_flow else ", ".join(known for known in SOLVERS if known != "flow_euler")
        raise PlanError("solver", f"not for {model} model", got=name, expected=f"one of {expected}")


def _checked_steps(steps: int | None, timesteps: Sequence[int] | None, num_train_timesteps: int) -> int:
    if steps is None and timesteps is not None:
        steps = len(timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= num_train_timesteps:
        expected = f"a whole number in 1..{num_train_timesteps}"
        raise PlanError("num_inference_steps", "cannot be used", got=steps, expected=expected)
    if timesteps is not None and len(timesteps) != steps:
        expected = f"{steps}, as num_inference_steps"
        raise PlanError("timesteps", "how many there are", got=len(timesteps), expected=expected)
    return steps


def _checked_timesteps(
    class_name: str, timesteps: Sequence[int] | None, config: Mapping[str, Any]
) -> tuple[int, ...] | None:
    if timesteps is None:
        return None
    lowest = _CLASSES[class_name].timesteps_from
    if lowest is None:
        takers = [known for known, compiled in _CLASSES.items() if compiled.timesteps_from is not None]
        expected = f"one of {', '.join(takers)}"
        raise PlanError(
            "timesteps", f"{class_name} takes no explicit time steps", got=list(timesteps), expected=expected
        )
    respaced = [key for key, value in config.items() if key.startswith("use_") and value]
    if respaced:
        raise PlanError("timesteps", f"explicit time steps together with {respaced[0]}", expected="one of the two")
    chosen, highest = tuple(timesteps), lowest + config["num_train_timesteps"] - 1
    whole = all(isinstance(t, int) and not isinstance(t, bool) for t in chosen)
    falling = whole and all(later < earlier for earlier, later in pairwise(chosen))
    if not falling or not lowest <= chosen[-1] <= chosen[0] <= highest:
        expected = f"falling whole numbers in {highest}..{lowest}"
        raise PlanError("timesteps", "cannot be used", got=list(chosen), expected=expected)
    return chosen


def _checked_begin(begin: int, steps: int) -> int:
    checked = whole_number(begin)
    if checked is None or not 0 <= checked < steps:
        expected = f"a whole number in 0..{steps - 1}, one of the schedule's {steps} steps"
        raise PlanError("begin", "cannot be used", got=begin, expected=expected)
    return checked


def _checked_eta(class_name: str, eta: float) -> float:
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not math.isfinite(eta) or not 0 <= eta <= 1:
        raise PlanError("eta", "cannot be used", got=eta, expected="a number in 0..1")
    takers = [known for known, compiled in _CLASSES.items() if compiled.takes_eta]
    if eta and class_name not in takers:
        raise PlanError("eta", f"{class_name} has none", got=eta, expected=f"0, or one of {', '.join(takers)}")
    return float(eta)
