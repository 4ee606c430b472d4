"""Scheduler configurations: which keys each diffusers scheduler class knows, and which of their values work here.

Longer than most modules because it is a table: thirteen classes, some 230 keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import PlanError

Config: TypeAlias = dict[str, Any]

MAX_TIMESTEPS = 100_000


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a scheduler configuration: diffusers' default, and what is accepted."""

    default: Any
    accepts: Callable[[Any], bool]
    expected: str


def one_of(default: Any, *others: Any) -> Key:
    values = (default, *others)
    named = ", ".join(repr(value) for value in values)
    return Key(default, lambda value: value in values and type(value) in map(type, values), f"one of {named}")


def flag(default: bool) -> Key:
    return Key(default, lambda value: value is None or isinstance(value, bool), "true or false")


def whole(default: int, low: int, high: int | None = None) -> Key:
    expected = f"a whole number, {low} or more" if high is None else f"a whole number in {low}..{high}"
    return Key(
        default, lambda value: _is_whole(value) and low <= value <= (math.inf if high is None else high), expected
    )


def real(default: float, low: float, high: float = math.inf) -> Key:
    return Key(default, lambda value: _is_real(value) and low <= value <= high, f"a number in {low:g}..{high:g}")


def positive_or_none() -> Key:
    return Key(
        None, lambda value: value is None or (_is_real(value) and 0 < value < math.inf), "a number above 0, or null"
    )


def only(supported: Any, default: Any = None) -> Key:
    """A key of which one value is supported; `default` where diffusers' own default is another."""
    return Key(
        supported if default is None else default,
        lambda value: value == supported or (value is None and supported is False),
        f"{supported!r}, the only value supported",
    )


def unread(default: Any) -> Key:
    """A key diffusers' class takes but reads only under another one that is not supported, or never."""
    return Key(default, lambda value: True, "anything")


def _numbers_or_none() -> Key:
    def accepts(value: Any) -> bool:
        return value is None or (
            isinstance(value, list | tuple) and all(_is_real(beta) and 0 <= beta < 1 for beta in value)
        )

    return Key(None, accepts, "null or a list of numbers in 0..1")


def _whole_numbers() -> Key:
    return Key(
        (), lambda value: isinstance(value, list | tuple) and all(map(_is_whole, value)), "a list of whole numbers"
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


def _training(start: float, end: float, *schedules: str) -> dict[str, Key]:
    return {
        "num_train_timesteps": whole(1000, 2, MAX_TIMESTEPS),
        "beta_start": real(start, 0, 1),
        "beta_end": real(end, 0, 1),
        "beta_schedule": one_of(*schedules),
        "trained_betas": _numbers_or_none(),
    }


def _spaced(default: str, *others: str) -> dict[str, Key]:
    return {"timestep_spacing": one_of(default, *others), "steps_offset": whole(0, 0, MAX_TIMESTEPS)}


_LINEAR = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SCALED_LINEAR = ("scaled_linear", "linear", "squaredcos_cap_v2")
_LEADING = _spaced("leading", "linspace", "trailing")
_LINSPACE = _spaced("linspace", "leading", "trailing")
_SPACING_UNREAD = {"timestep_spacing": unread("leading"), "steps_offset": unread(0)}
_EPSILON = {"prediction_type": one_of("epsilon", "v_prediction", "sample")}
_EPSILON_OR_V = {"prediction_type": one_of("epsilon", "v_prediction")}
_ZERO_SNR = {"rescale_betas_zero_snr": flag(False)}
_NO_THRESHOLDING = {
    "thresholding": only(False),
    "dynamic_thresholding_ratio": unread(0.995),
    "sample_max_value": unread(1.0),
}
_NO_CLIPPING = {"clip_sample": only(False), "clip_sample_range": unread(1.0)}
_CLIPPING_BY_DEFAULT = {**_NO_CLIPPING, "clip_sample": only(False, default=True)}
_SIGMA_SPACINGS = {
    "use_karras_sigmas": flag(False),
    "use_exponential_sigmas": flag(False),
    "use_beta_sigmas": only(False),
}
# Several classes read these two without declaring them.
_SIGMA_RANGE = {"sigma_min": positive_or_none(), "sigma_max": positive_or_none()}
_NO_DYNAMIC_SHIFTING = {"use_dynamic_shifting": only(False), "time_shift_type": unread("exponential")}
_NO_FLOW = {"use_flow_sigmas": only(False), "flow_shift": unread(1.0), **_NO_DYNAMIC_SHIFTING}
_FINAL_SIGMA = {"final_sigmas_type": one_of("zero", "sigma_min")}
_CONSISTENCY = {
    **_training(0.00085, 0.012, *_SCALED_LINEAR),
    **_EPSILON,
    **_ZERO_SNR,
    **_SPACING_UNREAD,
    "original_inference_steps": whole(50, 1, MAX_TIMESTEPS),
    "set_alpha_to_one": unread(True),
}

# Of the values that only name another class's variant, diffusers falls back to the class's own.
_FOREIGN_SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")

KEYS: Mapping[str, Mapping[str, Key]] = {
    "DDIMScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LEADING,
        **_EPSILON,
        **_ZERO_SNR,
        **_NO_THRESHOLDING,
        **_CLIPPING_BY_DEFAULT,
        "set_alpha_to_one": flag(True),
    },
    "DDPMScheduler": {
        **_training(0.0001, 0.02, *_LINEAR, "sigmoid", "laplace"),
        **_LEADING,
        **_EPSILON,
        **_ZERO_SNR,
        **_NO_THRESHOLDING,
        **_CLIPPING_BY_DEFAULT,
        # None, as DPM-Solver++ configurations carry it, is diffusers' plain posterior variance: fixed_small.
        "variance_type": one_of("fixed_small", "fixed_small_log", "fixed_large", None),
    },
    "PNDMScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LEADING,
        **_EPSILON_OR_V,
        "set_alpha_to_one": flag(False),
        "skip_prk_steps": only(True, default=False),
    },
    "LCMScheduler": {
        **_CONSISTENCY,
        **_NO_THRESHOLDING,
        **_NO_CLIPPING,
        "timestep_scaling": real(10.0, 0, 1e6),
    },
    "TCDScheduler": {
        **_CONSISTENCY,
        **{key: unread(_NO_THRESHOLDING[key].default) for key in _NO_THRESHOLDING},
        **{key: unread(_NO_CLIPPING[key].default) for key in _NO_CLIPPING},
        "timestep_scaling": unread(10.0),
    },
    "EulerDiscreteScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LINSPACE,
        **_EPSILON,
        **_ZERO_SNR,
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
        **_FINAL_SIGMA,
        "interpolation_type": only("linear"),
        "timestep_type": only("discrete"),
    },
    "EulerAncestralDiscreteScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LINSPACE,
        **_EPSILON_OR_V,
        **_ZERO_SNR,
    },
    "HeunDiscreteScheduler": {
        **_training(0.00085, 0.012, *_LINEAR, "exp"),
        **_LINSPACE,
        **_EPSILON,
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
        **_NO_CLIPPING,
    },
    "LMSDiscreteScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LINSPACE,
        **_EPSILON,
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
    },
    "DPMSolverMultistepScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LINSPACE,
        **_EPSILON,
        **_ZERO_SNR,
        **_NO_THRESHOLDING,
        **_NO_FLOW,
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
        **_FINAL_SIGMA,
        "use_lu_lambdas": flag(False),
        "algorithm_type": one_of("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": whole(2, 1, 3),
        "solver_type": one_of(*_FOREIGN_SOLVER_TYPES),
        "lower_order_final": flag(True),
        "euler_at_final": flag(False),
        "lambda_min_clipped": real(-math.inf, -math.inf),
        "variance_type": one_of(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    },
    "DEISMultistepScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LINSPACE,
        **_EPSILON,
        **_NO_THRESHOLDING,
        **_NO_FLOW,
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
        "algorithm_type": one_of("deis", "dpmsolver", "dpmsolver++"),
        "solver_order": whole(2, 1, 3),
        "solver_type": one_of("logrho", "midpoint", "heun", "bh1", "bh2"),
        "lower_order_final": flag(True),
    },
    "UniPCMultistepScheduler": {
        **_training(0.0001, 0.02, *_LINEAR),
        **_LINSPACE,
        **_EPSILON,
        **_ZERO_SNR,
        **_NO_THRESHOLDING,
        **_NO_FLOW,
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
        **_FINAL_SIGMA,
        "solver_order": whole(2, 1, 3),
        "solver_type": one_of("bh2", "bh1", "midpoint", "heun", "logrho"),
        "predict_x0": flag(True),
        "lower_order_final": flag(True),
        "disable_corrector": _whole_numbers(),
        "solver_p": only(None),
        "shift_terminal": only(None),
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": whole(1000, 2, MAX_TIMESTEPS),
        "shift": Key(1.0, lambda value: _is_real(value) and 0 < value < math.inf, "a number above 0"),
        **_NO_DYNAMIC_SHIFTING,
        "base_shift": unread(0.5),
        "max_shift": unread(1.15),
        "base_image_seq_len": unread(256),
        "max_image_seq_len": unread(4096),
        "invert_sigmas": only(False),
        "shift_terminal": Key(
            None, lambda value: value is None or (_is_real(value) and 0 <= value < 1), "a number in 0..1"
        ),
        **_SIGMA_SPACINGS,
        **_SIGMA_RANGE,
        "stochastic_sampling": flag(False),
    },
}

# Keys of other diffusers schedulers, which from_config drops without a word like those of the classes above.
_OTHER_KEYS = frozenset(
    (
        "corrector_order",
        "predictor_order",
        "rho",
        "s_noise",
        "sigma_data",
        "sigma_schedule",
        "snr_shift_scale",
        "tau_func",
    )
)
_FOREIGN_KEYS = _OTHER_KEYS.union(*KEYS.values())


def require_class(class_name: str) -> Mapping[str, Key]:
    """The keys of a scheduler class.

    Raises:
        PlanError: the class is not one of those supported.
    """
    if class_name not in KEYS:
        raise PlanError("solver", "unknown scheduler class", got=class_name, expected=f"one of {', '.join(KEYS)}")
    return KEYS[class_name]


def known_keys(class_name: str, config: Mapping[str, Any]) -> Config:
    """The part of a configuration that the class knows, as diffusers' `from_config` would take it.

    Dropped are private keys, values that diffusers filled in as another class's defaults, and keys that only other
    scheduler classes know.

    Raises:
        PlanError: the class is unknown, a key is known to no scheduler, or the private one read here is no list.
    """
    keys = require_class(class_name)
    defaulted = config.get("_use_default_values", ())
    if not isinstance(defaulted, list | tuple):
        raise PlanError(f"{class_name}: _use_default_values", "type", got=defaulted, expected="a list of keys")
    known = {}
    for name, value in config.items():
        if name.startswith("_") or name in defaulted:
            continue
        if name in keys:
            known[name] = value
        elif name not in _FOREIGN_KEYS:
            raise PlanError(
                f"{class_name}: {name}",
                "unknown scheduler key",
                got=value,
                expected=f"a key of the class: {', '.join(keys)}",
                remedy="Correct the name, or leave the key out.",
            )
    return known


def effective_config(class_name: str, config: Mapping[str, Any]) -> Config:
    """Every key of the class with its value or diffusers' default, checked.

    Raises:
        PlanError: the class is unknown, or the key it names is known to no scheduler or has an unsupported value.
    """
    keys, given = require_class(class_name), known_keys(class_name, config)
    effective = {name: given.get(name, key.default) for name, key in keys.items()}
    for name, key in keys.items():
        if not _accepted(key, effective[name]):
            origin = "" if name in given else " (diffusers' default for this class)"
            raise PlanError(
                f"{class_name}: {name}", f"unsupported value{origin}", got=effective[name], expected=key.expected
            )
    _require_one_sigma_spacing(class_name, effective)
    betas, count = effective.get("trained_betas"), effective["num_train_timesteps"]
    if betas is not None and len(betas) != count:
        raise PlanError(f"{class_name}: trained_betas", "how many there are", got=len(betas), expected=f"{count}")
    return effective


def _accepted(key: Key, value: Any) -> bool:
    try:
        return key.accepts(value)
    except (TypeError, ValueError):  # values such as arrays have no one truth when compared
        return False


def _require_one_sigma_spacing(class_name: str, config: Config) -> None:
    names: Iterable[str] = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
    chosen = [name for name in names if config.get(name)]
    if len(chosen) > 1:
        raise PlanError(f"{class_name}: {chosen[1]}", "more than one sigma spacing", got=chosen, expected="at most one")
