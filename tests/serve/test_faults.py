"""Faults on the way, expired tokens, clocks that go wrong: the picture of both places, or all of it here and why."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tandemrt.runtime import Cloud, Pipeline

from .asking import TOKEN, measured
from .conftest import serving
from .edge import TANDEM, painted, port_of, require_allowed
from .faults import Faults, between

SEED, CASES, SECONDS = 8, 16, 0.4
ALL = 1_000_000


def rows(client: httpx.Client) -> float:
    """How many rows the server's large denoiser has run."""
    return measured(client, 'tandemrt_rows_total{denoiser="unet"}')


def test_faults_together(bundle: Path, server: httpx.Client, allowed: tuple[Any, Any]) -> None:
    reasons = []
    for number in range(CASES):
        random = Random(f"{SEED}/{number}")
        up, down = some_faults(random), some_faults(random)
        told = f"case {number}, up {up}, down {down}"
        with between(port_of(server), up, down) as proxy:
            reasons.append(require_allowed(painted(bundle, proxy, seconds=SECONDS), allowed, told))
    assert {"", "deadline"} <= set(reasons)


def some_faults(random: Random) -> Faults:
    """None, one or two of them, on the first connections or on all."""
    drawn = {
        "delay_s": random.uniform(0.0, 0.5),
        "bytes_per_s": random.choice((500, 5_000, 50_000)),
        "cut_after": random.randrange(1500),
        "corrupted": random.randrange(1500),
        "doubled": random.randrange(1500),
        "swallowed": True,
        "replayed": True,
    }
    chosen = random.sample(sorted(drawn), random.choice((0, 1, 1, 2)))
    return Faults(connections=random.choice((1, 1, 2, ALL)), **{name: drawn[name] for name in chosen})


def test_a_prompt_that_was_damaged_paints_no_other_picture(
    bundle: Path, server: httpx.Client, allowed: tuple[Any, Any]
) -> None:
    with between(port_of(server)) as proxy:
        assert require_allowed(painted(bundle, proxy), allowed) == ""
    place = proxy.sent.index(b"red")
    with between(port_of(server), up=Faults(corrupted=place)) as proxy:
        assert require_allowed(painted(bundle, proxy), allowed) == "refused"
    assert b"2ed" in proxy.sent


@pytest.mark.parametrize("what", ["comes twice", "is asked for again"])
def test_a_request_is_painted_once(what: str, bundle: Path, server: httpx.Client, allowed: tuple[Any, Any]) -> None:
    twice = what == "comes twice"
    up, down = (Faults(replayed=True), Faults()) if twice else (Faults(), Faults(cut_after=300, connections=1))
    before = rows(server)
    with between(port_of(server), up, down) as proxy:
        output = painted(bundle, proxy)
    assert require_allowed(output, allowed) == ""
    assert output.cloud[0].tries == (1 if twice else 2)
    assert rows(server) - before == 2


def test_a_token_that_expires(bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any]) -> None:
    with (
        serving(pipe, token=TOKEN) as first,
        serving(pipe, token=f"{TOKEN}-of-today") as second,
        between(port_of(first)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, TOKEN, seconds=20)) as edge,
    ):
        assert require_allowed(edge(**TANDEM), allowed) == ""
        proxy.server_port = port_of(second)
        proxy.begin()
        assert require_allowed(edge(**TANDEM), allowed) == "unauthorized"
        assert proxy.sent.count(b"POST /v1/handoff") == 1  # asking again would not help


def test_clocks_that_go_wrong(
    bundle: Path, server: httpx.Client, allowed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, days = time.time, itertools.cycle((-3, 400, 0, -10_000))
    monkeypatch.setattr(time, "time", lambda: now() + 86_400 * next(days))
    with between(port_of(server), down=Faults(cut_after=300, connections=1)) as proxy:
        output = painted(bundle, proxy)
    assert require_allowed(output, allowed) == ""
    assert output.cloud[0].tries == 2
    with between(port_of(server), up=Faults(swallowed=True)) as proxy:
        output = painted(bundle, proxy, seconds=0.3)
    assert require_allowed(output, allowed) == "deadline"
