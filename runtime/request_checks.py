"""Checks of single arguments of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from .arguments import did_you_mean, finite_number, whole_number
from .errors import RequestError
from .variant import MAX_LORA_SLOTS

Float32 = npt.NDArray[np.float32]
MAX_SIDE = 16_384
MAX_PICTURES = 4096
MAX_STATED_SIZE = 1 << 20

# Arguments of diffusers' pipelines that have another name here.
_INSTEAD = {
    "generator": "Give seed=, a number or one for each picture.",
    "callback": "Use pipe.stream(...), which gives an event after each row.",
    "callback_on_step_end": "Use pipe.stream(...), which gives an event after each row.",
    "return_dict": "Leave it out: what comes back is an Output with images.",
    "sigmas": "Give timesteps=, or sigma keys such as use_karras_sigmas in solver_config=.",
}


def checked_array(where: str, array: Float32, shape: tuple[int | None, ...]) -> Float32:
    """`array` if it is float32, finite and of `shape` (None: any size).

    Raises:
        RequestError: it is not.
    """
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise RequestError(where, "type", got=getattr(array, "dtype", type(array).__name__), expected="a float32 array")
    fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
    if not fits:
        raise RequestError(where, "shape", got=array.shape, expected=wanted)
    if not np.isfinite(array).all():
        raise RequestError(where, "holds NaN or Inf", expected="finite values")
    return array


def require_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise RequestError when one of the names `given` is not `known`."""
    for name in given:
        if name not in known:
            remedy = _INSTEAD.get(name) or did_you_mean(name, known) or "Leave it out."
            raise RequestError(name, "unknown argument", expected=f"one of {', '.join(known)}", remedy=remedy)


def require_pictures(value: object) -> None:
    """Raise RequestError when `value` is no usable `num_images_per_prompt`."""
    pictures = whole_number(value)
    if pictures is None or not 1 <= pictures <= MAX_PICTURES:
        expected = f"a whole number in 1..{MAX_PICTURES}"
        raise RequestError("num_images_per_prompt", "not usable", got=value, expected=expected)


def side(name: str, given: object, multiple: int) -> int:
    """A side in pixels; raises RequestError unless it is a positive multiple of `multiple`."""
    pixels = whole_number(given)
    if pixels is None or not 0 < pixels <= MAX_SIDE or pixels % multiple:
        expected = f"a positive multiple of {multiple} pixels, at most {MAX_SIDE}"
        remedy = ""
        if pixels is not None:
            nearest = min((pixels + multiple // 2) // multiple, MAX_SIDE // multiple)
            remedy = f"Ask for {max(nearest, 1) * multiple}."
        raise RequestError(name, "not usable", got=given, expected=expected, remedy=remedy)
    return pixels


def texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several as a tuple; raises RequestError for what is neither."""
    if not isinstance(value, str | Sequence):
        raise RequestError(name, "type", got=type(value).__name__, expected="a string or a sequence of strings")
    return (value,) if isinstance(value, str) else tuple(value)


def require_count(name: str, given: int, prompts: int) -> None:
    """Raise RequestError unless there is one, or one for each prompt."""
    if given not in (1, prompts):
        raise RequestError(name, "how many there are", got=given, expected=f"1 or {prompts}, as the prompts")


def size_pair(name: str, given: object) -> tuple[int, int]:
    """A height and a width, or a top and a left; raises RequestError unless they are whole numbers, 0 or more."""
    pair = [whole_number(side) for side in given] if isinstance(given, tuple | list) else []
    if len(pair) != 2 or any(value is None or not 0 <= value <= MAX_STATED_SIZE for value in pair):
        expected = f"two whole numbers in 0..{MAX_STATED_SIZE}"
        raise RequestError(name, "not usable", got=given, expected=expected)
    return cast("tuple[int, int]", tuple(pair))


def checked_loras(loras: Mapping[str | Path, float]) -> dict[Path, float]:
    """A request's LoRAs, by path.

    Raises:
        RequestError: no mapping of paths to finite numbers, too many, or one file twice.
    """
    if not isinstance(loras, Mapping) or not all(isinstance(path, str | Path) for path in loras):
        expected = 'scales by path such as {"style.safetensors": 0.8}'
        raise RequestError("loras", "not LoRAs", got=loras, expected=expected)
    if len(loras) > MAX_LORA_SLOTS:
        raise RequestError("loras", "how many there are", got=len(loras), expected=f"at most {MAX_LORA_SLOTS}")
    found: dict[Path, float] = {}
    for path, scale in loras.items():
        number = finite_number(scale)
        if number is None:
            raise RequestError(f"loras: {path}", "scale", got=scale, expected="a finite number")
        if Path(path) in found:
            raise RequestError(f"loras: {path}", "given twice", expected="every file once", remedy="Add the scales up.")
        found[Path(path)] = number
    return found
