"""What `tandemrt.serve.ray_app` is told of a bundle that is spread over machines. Needs no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from tandemrt.runtime.errors import ArgumentError, told_as
from tandemrt.runtime.tokens import token_in_environment

from .command import TOKEN
from .limits import Limits

NONE = "none"
_RUNNING = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What `build` is told, in a Serve config's `args` or on the command line.

    bundle: its folder, at the same path on every machine. target, cache: as of `tandemrt serve`.
    token_file: the file of what requests have to bring, where `http` runs; `none` lets everybody ask who reaches it.
        $TANDEMRT_TOKEN otherwise, where the application is built.
    branches: the denoisers, with commas between, whose branches of guidance run on two replicas at once.
    limits: of the server; `running` is how many requests are under way in all parts together.
    """

    bundle: str
    target: str = "auto"
    cache: str | None = None
    token_file: str | None = None
    branches: str = ""
    limits: Limits = field(default_factory=lambda: Limits(running=_RUNNING))


def options_of(args: Mapping[str, Any]) -> Options:
    """What `build` was told.

    Raises:
        ArgumentError: an option is unknown, missing, or of another type; or a limit is out of range.
    """
    limits = args.get("limits", {})
    for where, given, kind in (("args", args, Options), ("limits", limits, Limits)):
        known = [one.name for one in fields(kind) if one.name != "batch"]  # parts run requests one by one
        if not isinstance(given, Mapping) or not set(known).issuperset(given):
            raise ArgumentError(where, "unknown options", got=given, expected=f"of {', '.join(known)}")
    try:
        with told_as("limits"):
            return msgspec.convert({**args, "limits": {"running": _RUNNING, **limits}}, Options, strict=False)
    except msgspec.ValidationError as error:
        raise ArgumentError("args", str(error)) from error


def apart_of(options: Options, denoisers: Sequence[str]) -> tuple[str, ...]:
    """The denoisers whose branches of guidance run on two replicas.

    Raises:
        ArgumentError: there is none of a name.
    """
    apart = tuple(name.strip() for name in options.branches.split(",") if name.strip())
    for name in apart:
        if name not in denoisers:
            raise ArgumentError("branches", "unknown denoiser", got=name, expected=f"of {', '.join(denoisers)}")
    return apart


def token_of(options: Options) -> str | None:
    """What requests have to bring by the environment, where no file says it.

    Who is to let everybody ask has to say so: the machines stand in a network.

    Raises:
        ArgumentError: there is none anywhere, or what is there is no token.
    """
    if options.token_file is not None:
        return None
    token = token_in_environment(TOKEN)
    if token is None:
        remedy = f"Put one into ${TOKEN} or a file for token_file; token_file=none lets everybody ask."
        raise ArgumentError("token_file", "there is no token", remedy=remedy)
    return token
