"""How tests ask a server, read its answers, and wait for what it does."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image

from tandemrt.runtime.cloud import JSON

TOKEN = "a-token-of-some-length"


class Pace:
    """Makes each run of a denoiser take a while, and counts them."""

    def __init__(self) -> None:
        self.runs, self.seconds = 0, 0.0
        self.open = threading.Event()
        self.open.set()

    def __call__(self, component: str, _: Mapping[str, Any]) -> None:
        if component.startswith("unet"):
            self.runs += 1
            self.open.wait(60)
            time.sleep(self.seconds)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let none run on."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def measured(client: httpx.Client, name: str) -> float:
    """A metric's value, over all its labels."""
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def decoded(encoded: str) -> Any:
    """A picture of an answer, from its base64."""
    made = Image.open(io.BytesIO(base64.b64decode(encoded)))
    made.load()
    return made


def pictures_of(answer: httpx.Response) -> list[Any]:
    """The pictures of `/v1/images/generations`."""
    assert answer.status_code == 200, answer.text
    return [decoded(one["b64_json"]) for one in answer.json()["data"]]


def events_of(answer: httpx.Response) -> list[tuple[str, Any]]:
    """What `/v1/images/stream` told, by name."""
    assert answer.status_code == 200, answer.text
    parts = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def connection(client: httpx.Client, head: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request was sent."""
    url = client.base_url
    opened = socket.create_connection((url.host, url.port or 0), timeout=10)
    opened.sendall(f"{head}\r\nHost: 127.0.0.1\r\n".encode() + b"\r\n" + body)
    return opened


def asked(client: httpx.Client, job: Mapping[str, Any], path: str = "/v1/handoff") -> socket.socket:
    body = json.dumps(job).encode()
    return connection(client, f"POST {path} HTTP/1.1\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}", body)


def status_of(opened: socket.socket) -> int:
    with opened:
        return int(opened.makefile("rb").readline().split()[1])


def counted(client: httpx.Client, endpoint: str, outcome: str) -> float:
    """How many requests for an endpoint had an outcome."""
    return measured(client, f'tandemrt_requests_total{{endpoint="{endpoint}",outcome="{outcome}"}}')
