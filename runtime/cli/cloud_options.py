"""The options that name a server for a part of the steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..cloud import SECONDS, Cloud
from ..errors import ArgumentError
from ..tokens import token_in_environment, token_in_file

CLOUD_TOKEN = "TANDEMRT_CLOUD_TOKEN"


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
        "--cloud-seconds", type=float, metavar="S", help=f"how long a picture may wait for it ({SECONDS:g})"
    )
    group.add_argument(
        "--cloud-half",
        action="store_true",
        default=None,
        help="states travel in float16: half the bytes, rounded to 11 bits",
    )


def cloud_from(namespace: argparse.Namespace) -> Cloud | None:
    """The server that the options name, if any.

    Raises:
        ArgumentError: a value cannot be used, or is of a server that is not named.
    """
    if namespace.cloud is None:
        for name in ("cloud_token_file", "cloud_seconds", "cloud_half"):
            if getattr(namespace, name) is not None:
                raise ArgumentError(f"--{name.replace('_', '-')}", "given without --cloud", remedy="Give both.")
        return None
    seconds = SECONDS if namespace.cloud_seconds is None else namespace.cloud_seconds
    file = namespace.cloud_token_file
    token = token_in_environment(CLOUD_TOKEN) if file is None else token_in_file(f"--cloud-token-file {file}", file)
    try:
        return Cloud(namespace.cloud, token, seconds=seconds, half=bool(namespace.cloud_half))
    except ArgumentError as error:  # which names the argument that `Cloud` has in Python
        named = error.again()
        named.where = {"cloud": "--cloud", "seconds": "--cloud-seconds"}.get(error.where, error.where)
        named.args = (named.where + str(error).removeprefix(error.where),)
        raise named from None
