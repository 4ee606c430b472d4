"""`/v1/handoff` under bodies and byte streams by a seeded generator: answers, no crash, and it still paints.

`TANDEMRT_FUZZ_S` says for how many seconds, `TANDEMRT_FUZZ_SEED` by which seed: a failure tells it and the number of
the case, which `TANDEMRT_FUZZ_FIRST` begins with.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import pytest

from tandemrt.runtime import Handover, Pipeline
from tandemrt.serve.limits import Limits

from .conftest import serving
from .mutations import JOBS, json_case, message_case, noise_case, stream_case

SECONDS = float(os.environ.get("TANDEMRT_FUZZ_S", "4"))
SEED = int(os.environ.get("TANDEMRT_FUZZ_SEED", "0"))
FIRST = int(os.environ.get("TANDEMRT_FUZZ_FIRST", "0"))
LIMITS = Limits(seconds=2, steps=12, pictures=2, pixels=128 * 128, prompt_bytes=4096)
JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}
# What is meant; 504 where a case asks for less time than its steps take. Besides, `not_finite`: guidance of 1e30.
MEANT = {200, 400, 404, 409, 413, 415, 422, 504}
MEANT_OF_STREAMS = MEANT | {403, 405, 408, 431, 499}  # 403 where a Host header is another than this machine's
GROWTH_BYTES = 64 << 20
QUIET_S = 0.05  # after which a stream that lies is ended
_ERROR = re.compile(r"Traceback|site-packages|\.py\b|0x[0-9a-f]{6}")


@dataclass(eq=False)
class Log(logging.Handler):
    """What the server says went wrong."""

    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "Invalid HTTP request received" not in text:
            self.told.append(text)


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    loggers = [logging.getLogger(name) for name in ("tandemrt.serve", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.slow
def test_handoffs_of_any_bytes(pipe: Pipeline, bundle: Path, log: Log) -> None:
    handover = pipe(**JOB, until=2).handover
    assert handover is not None
    outcomes: Counter[str] = Counter()
    with serving(pipe, LIMITS) as client:
        threads = threading.active_count()
        ends, grown_from = time.monotonic() + SECONDS, (time.monotonic() + SECONDS / 3, 0)
        number = FIRST
        while time.monotonic() < ends:
            random, number = Random(f"{SEED}/{number}"), number + 1
            where = f"TANDEMRT_FUZZ_SEED={SEED} TANDEMRT_FUZZ_FIRST={number - 1}"
            began = time.monotonic()
            outcomes[one_case(random, client, handover, str(bundle.parent), where)] += 1
            assert time.monotonic() - began < LIMITS.seconds + 1, f"{where}: late"
            assert log.told == [], f"{where}: {log.told}"
            if not grown_from[1] and began > grown_from[0]:
                grown_from = (began, resident_bytes())
        grown = resident_bytes() - grown_from[1]
        paints = client.post("/v1/handoff", json={**JOB, "until": 5})
        left = threading.active_count() - threads
    print(f"{number - FIRST} cases by seed {SEED}, {grown / 1e6:.1f} MB: {dict(outcomes.most_common())}")
    np.testing.assert_array_equal(Handover.from_bytes(paints.content).state[0], pipe(**JOB).latents)
    assert grown < GROWTH_BYTES
    assert left <= 8, "threads are left"  # of asyncio.to_thread's pool
    assert {"200", "400", "409", "422"} <= outcomes.keys()


def one_case(random: Random, client: httpx.Client, handover: Handover, folder: str, where: str) -> str:
    """Send a case, and look at what comes back; its status."""
    kind = random.random()
    if kind < 0.1:
        return streamed(client, stream_case(random), where)
    if kind < 0.55:
        body, headers = json_case(random)
    elif kind < 0.97:
        body, headers = message_case(random, handover, {**JOB})
    else:
        body, headers = noise_case(random)
    answer = client.post("/v1/handoff", content=body, headers=headers)
    told = f"{where}: {answer.status_code} {answer.text[:300]!r} for {body[:600]!r}"
    assert answer.status_code in MEANT or '"not_finite"' in answer.text, told
    if answer.status_code == 200:
        made = Handover.from_bytes(answer.content)
        assert made.state.ndim == 5, told
    else:
        error = answer.json()["error"]
        assert error["code"] == answer.status_code, told
        assert len(answer.content) < 8 << 10, told
        assert folder not in error["message"], told
        assert not _ERROR.search(error["message"]), told
    return str(answer.status_code)


def streamed(client: httpx.Client, data: bytes, where: str) -> str:
    """Send bytes, and end them; the status of the first answer, or that there was none."""
    assert client.base_url.port is not None
    received = bytearray()
    address = "127.0.0.1", client.base_url.port
    with socket.create_connection(address, timeout=QUIET_S) as connection, suppress(ConnectionError):
        connection.sendall(data)
        with suppress(TimeoutError):
            while chunk := connection.recv(1 << 16):
                received += chunk
        connection.settimeout(LIMITS.seconds + 1)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(1 << 16):
            received += chunk
    if not received:
        return "ended"
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    assert found, f"{where}: {bytes(received[:300])!r} for {data[:600]!r}"
    status = int(found[1])
    while status == 100:
        found = re.search(rb"\r\n\r\nHTTP/1\.1 (\d{3}) ", received)
        if found is None:
            return "ended"
        status = int(found[1])
    assert status in MEANT_OF_STREAMS, f"{where}: {bytes(received[:300])!r} for {data[:600]!r}"
    return str(status)


def resident_bytes() -> int:
    """How much memory this process, server and client, has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_cases_of_a_seed_are_the_same() -> None:
    def cases() -> list[Any]:
        state = np.zeros((2, 1, 4, 8, 8), np.float32)
        handover = Handover(state, 2, "0" * 64, "", 7)
        makers = (json_case, lambda random: message_case(random, handover, JOBS[0]), noise_case, stream_case)
        return [make(Random(f"1/{number}")) for number in range(20) for make in makers]

    assert cases() == cases()
