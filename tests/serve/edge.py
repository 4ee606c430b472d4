"""How tests paint in two places, and which pictures they may get."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tandemrt.runtime import Cloud, Output, Pipeline

from .faults import Proxy

TANDEM: dict[str, Any] = {"prompt": "red", "steps": {"cloud:unet": 2, "unet_free": 3}, "seed": 7}
HERE: dict[str, Any] = {**TANDEM, "steps": {"unet": 2, "unet_free": 3}}
ALONE: dict[str, Any] = {**TANDEM, "steps": {"unet_free": 5}}
SECONDS = 2.0
# Why a device may have painted alone after a fault.
REASONS = {"deadline", "unreachable", "malformed", "refused", "failed", "busy", "unready", "unauthorized", "conflict"}


def port_of(client: httpx.Client) -> int:
    assert client.base_url.port is not None
    return client.base_url.port


def painted(bundle: Path, where: str | Proxy, job: Mapping[str, Any] = TANDEM, **options: Any) -> Output:
    """What a device paints with a server, or with one behind a proxy, whose faults begin once the device is open."""
    cloud = Cloud(where if isinstance(where, str) else where.url, **{"seconds": SECONDS, **options})
    with Pipeline.open(bundle, threads=1, cloud=cloud) as edge:
        if isinstance(where, Proxy):
            where.begin()
        began = time.monotonic()
        output = edge(**job)
        assert time.monotonic() - began < cloud.seconds + 1
    return output


def require_allowed(output: Output, allowed: tuple[Any, Any], told: str = "") -> str:
    """Check that a picture is the one that it says it is; the reason why it is not that of both places.

    allowed: the fixture of this name. told: of what befell it, where a check fails.
    """
    reason = output.degraded.partition(":")[0]
    assert reason in {"", *REASONS}, f"{output.degraded} {told}"
    np.testing.assert_array_equal(output.latents, allowed[bool(reason)], told)
    return reason
