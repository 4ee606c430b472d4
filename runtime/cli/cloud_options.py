"""The options that name a server for a part of the steps, and the tokens of servers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..cloud import Cloud
from ..errors import ArgumentError

CLOUD_TOKEN = "TANDEMRT_CLOUD_TOKEN"
DEFAULT_SECONDS = 30.0
LEAST_CHARACTERS = 16


def add_cloud(parser: argparse.ArgumentParser) -> None:
    """Declare `--cloud` and what belongs to it."""
    group = parser.add_argument_group("a server for a part of the steps")
    group.add_argument(
        "--cloud",
        metavar="URL",
        help="where `tandemrt serve` runs, such as https://host:8080; --steps may then name its denoisers, such as "
        "cloud:unet:10,unet_small:15. Where it does not help in time, all steps run here",
    )
    group.add_argument("--cloud-token-file", type=Path, metavar="FILE", help=f"what it wants to see; or ${CLOUD_TOKEN}")
    group.add_argument(
        "--cloud-seconds", type=float, metavar="S", help=f"how long it may take for its steps ({DEFAULT_SECONDS:g})"
    )


def cloud_from(namespace: argparse.Namespace) -> Cloud | None:
    """The server that the options name, if any.

    Raises:
        ArgumentError: a value cannot be used, or is of a server that is not named.
    """
    if namespace.cloud is None:
        for name in ("cloud_token_file", "cloud_seconds"):
            if getattr(namespace, name) is not None:
                raise ArgumentError(f"--{name.replace('_', '-')}", "given without --cloud", remedy="Give both.")
        return None
    seconds = DEFAULT_SECONDS if namespace.cloud_seconds is None else namespace.cloud_seconds
    file = namespace.cloud_token_file
    token = token_in_environment(CLOUD_TOKEN) if file is None else token_in_file(f"--cloud-token-file {file}", file)
    return Cloud(namespace.cloud, token, seconds=seconds)


def token_in_environment(variable: str) -> str | None:
    """The token in a variable; None where it is empty or not set. ArgumentError: it is no token."""
    token = os.environ.get(variable, "")
    return _usable(f"${variable}", token) if token else None


def token_in_file(where: str, file: Path) -> str:
    """The token in a file; ArgumentError, which begins with `where`, if it cannot be read or holds none."""
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ArgumentError(where, f"cannot be read ({error})") from error
    if not token:
        raise ArgumentError(where, "is empty")
    return _usable(where, token)


def _usable(where: str, token: str) -> str:
    if not (token.isascii() and token.isprintable() and len(token) >= LEAST_CHARACTERS):
        expected = f"{LEAST_CHARACTERS} or more ASCII characters that can be printed"
        raise ArgumentError(where, "is no token", expected=expected)
    return token
