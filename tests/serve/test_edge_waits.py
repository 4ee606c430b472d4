"""How long a device waits for its server, whatever it waits for, and over which connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandemrt.runtime import CancelledError, Cloud, Pipeline, TandemError, there
from tandemrt.runtime.bounded_socket import Bounds
from tandemrt.runtime.errors import CloudError
from tandemrt.runtime.messages import unpacked
from tandemrt.serve.protocol import TENSORS

from .faults import Faults, between
from .test_edge import TANDEM, painted, port_of


def test_a_connection_is_kept_and_replaced(bundle: Path, client: httpx.Client) -> None:
    with (
        between(port_of(client)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=proxy.url) as edge,
    ):
        assert proxy.connections == 1
        for _ in range(2):
            assert edge(**TANDEM).degraded == ""
        assert proxy.connections == 1
        proxy.begin()  # those that are there end
        for _ in range(2):
            output = edge(**TANDEM)
            assert (output.degraded, output.cloud[0].tries) == ("", 1)
        assert proxy.connections == 1


def test_all_hand_overs_have_one_deadline_which_the_server_is_told(
    bundle: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    exchanged = Cloud._exchanged

    def slowly(self: Cloud, method: str, path: str, body: bytes, *more: Any) -> bytes:
        if method == "POST":
            _, facts = unpacked("body", body, TENSORS, {"protocol": True, "request": True})
            told.append(json.loads(facts["request"])["timeout"])
            time.sleep(0.2)
        return exchanged(self, method, path, body, *more)

    monkeypatch.setattr(Cloud, "_exchanged", slowly)
    steps = [("cloud:unet", 1), ("unet_free", 1), ("cloud:unet", 1), ("unet_free", 1)]
    output = painted(bundle, str(client.base_url), {**TANDEM, "steps": steps}, seconds=1.5)
    assert output.degraded == ""
    assert told[0] == pytest.approx(1.5, abs=0.01)
    assert told[1] == pytest.approx(1.5 - output.cloud[0].seconds, abs=0.01)
    assert told[1] < 1.31


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_opening_does_not_wait_long_for_a_server_that_says_nothing(
    silent: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(there, "OPENING_S", 0.1)
    began = time.monotonic()
    with Pipeline.open(bundle, threads=1, cloud=silent) as edge:
        assert time.monotonic() - began < 5
        assert "cloud:unet" in edge.manifest.components


def test_who_waits_while_another_asks_has_his_own_end(
    silent: str, bundle: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(there, "OPENING_S", 0.05)
    asked = there.There(Cloud(silent, seconds=20), pipe.bundle.manifest)
    first = threading.Event()
    asking = threading.Thread(target=ended, args=(asked, asked.cloud.bounds(first)))
    asking.start()
    while not asked._lock.locked():
        time.sleep(0.01)
    began = time.monotonic()
    late = ended(asked, Bounds(time.monotonic() + 0.2, threading.Event()))
    assert (type(late), getattr(late, "reason", "")) == (CloudError, "deadline")
    cancelled = threading.Event()
    cancelled.set()
    assert type(ended(asked, asked.cloud.bounds(cancelled))) is CancelledError
    assert 0.2 <= time.monotonic() - began < 1
    first.set()
    asking.join(1)
    assert not asking.is_alive()


def ended(asked: there.There, bounds: Bounds) -> TandemError | None:
    """How asking a server ended."""
    try:
        asked.ask(bounds)
    except TandemError as error:
        return error
    return None


def test_a_failure_when_a_pipeline_is_opened_costs_no_try(bundle: Path, client: httpx.Client) -> None:
    with between(port_of(client), down=Faults(cut_after=10, connections=3)) as proxy:
        proxy.begin()
        with Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=3)) as edge:
            assert proxy.connections == 1
            output = edge(**TANDEM)
    assert (output.degraded, output.cloud[0].tries) == ("", 3)


def test_a_server_that_fails_is_left_alone_for_a_while(bundle: Path, client: httpx.Client) -> None:
    with (
        between(port_of(client), down=Faults(cut_after=10)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=2)) as edge,
    ):
        proxy.begin()
        assert edge(**TANDEM).degraded.startswith("unreachable")
        asked = proxy.connections
        assert edge(**TANDEM).degraded.startswith("broken")
        assert proxy.connections == asked
