"""Option values that are more than a word or a number."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ArgumentError, RequestError

SHORT_FOR = {"unet_small": "--small", "vae_decoder_tiny": "--tiny-vae"}
"""The components that have an option of their own beside `--add`."""

_BARE_WORD = re.compile(r"[a-z][a-z0-9_+-]*")


def parse_size(text: str) -> tuple[int, int]:
    """`64` or `WIDTHxHEIGHT`, in pixels, as (width, height).

    Raises:
        RequestError: neither.
    """
    found = re.fullmatch(r"([0-9]{1,6})(?:[x×]([0-9]{1,6}))?", text.strip().lower())
    if found is None:
        raise RequestError("--size", "not a size", got=text, expected="pixels such as 512, or WIDTHxHEIGHT: 768x512")
    width = int(found[1])
    return width, int(found[2]) if found[2] else width


def parse_interval(option: str, text: str) -> tuple[float, float]:
    """`0.0,0.8` as a pair of numbers; whether they make sense is for the plan to say.

    Raises:
        RequestError: not two numbers; `option` names it.
    """
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError as error:
        expected = "two fractions of the steps such as 0.0,0.8"
        raise RequestError(option, "not an interval", got=text, expected=expected) from error
    return start, end


def parse_devices(option: str, text: str) -> tuple[int, ...]:
    """`0,1` as indices; which there may be is for the pipeline to say. RequestError where one is no whole number."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        expected = "CUDA's indices of one or two GPUs such as 0,1"
        raise RequestError(option, "not a list of GPUs", got=text, expected=expected) from error


def parse_number(option: str, text: str) -> float:
    """A number; raises RequestError, in which `option` names it, for anything else."""
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(option, "not a number", got=text, expected="a number such as 0.8") from error


def parse_named(option: str, values: Sequence[str]) -> dict[str | None, str]:
    """Values that are NAME=VALUE each, or one VALUE without a name, which stands under None.

    Raises:
        RequestError: a name given twice, or a value without one beside others.
    """
    named: dict[str | None, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        key = name if equals and name.isidentifier() else None
        if key in named or (named and (key is None or None in named)):
            expected = "one value, or NAME=VALUE with every name once"
            raise RequestError(option, "values that are not told apart", got=list(values), expected=expected)
        named[key] = value if key is None else rest
    return named


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE` as a LoRA's path and its scale; a colon that no number follows is part of the path.

    Raises:
        ArgumentError: no file before the scale, or what follows a file's name is no number.
    """
    path, colon, number = text.rpartition(":")
    try:
        source = (path, float(number)) if colon else (text, 1.0)
    except ValueError:
        if Path(path).exists() and not Path(text).exists():
            raise ArgumentError("--lora", f"scale of {path}", got=number, expected="a number such as 0.8") from None
        source = (text, 1.0)
    if not source[0]:
        expected = "FILE or FILE:SCALE such as anime.safetensors:0.8"
        raise ArgumentError("--lora", "not a LoRA", got=text, expected=expected)
    return Path(source[0]), source[1]


def parse_timesteps(text: str) -> tuple[int, ...]:
    """`999,749,499,249` as whole numbers.

    Raises:
        RequestError: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        expected = "whole numbers such as 999,749,499,249"
        raise RequestError("--timesteps", "not time steps", got=text, expected=expected) from error


def parse_settings(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs, values being JSON or a bare lower-case word.

    A bare `True` is refused: it would become a text, and as a text `False` would count as true.

    Raises:
        ArgumentError: no `=`, a key given twice, or a value that is neither; `option` names it.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ArgumentError(option, "not a setting", got=pair, expected="key=value")
        if key in settings:
            raise ArgumentError(option, "a key given twice", got=key)
        try:
            settings[key] = json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            if not _BARE_WORD.fullmatch(value):
                expected = 'JSON such as true, 0.5 or "trailing", or a lower-case word'
                raise ArgumentError(f"{option} {key}", "value", got=value, expected=expected) from error
            settings[key] = value
    return settings


def parse_sources(small: Path | None, tiny_vae: Path | None, add: Sequence[str]) -> dict[str, Path]:
    """The folders that `--small`, `--tiny-vae` and every `--add NAME=DIR` name, by component.

    Raises:
        ArgumentError: not NAME=DIR, or a component given twice.
    """
    sources = {name: folder for name, folder in zip(SHORT_FOR, (small, tiny_vae), strict=True) if folder is not None}
    for pair in add:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise ArgumentError("--add", "not a source", got=pair, expected="NAME=DIR such as unet_one_step=one-step")
        if name in sources:
            raise ArgumentError("--add", "a component given twice", got=name, expected="every name once")
        sources[name] = Path(folder)
    return sources


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
