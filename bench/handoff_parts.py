"""A hand-over's parts: one more exchange with the server, looked at closely, and what either side does by itself."""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tandemrt.runtime import Handover, Pipeline
from tandemrt.runtime.cloud import MESSAGE, message
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.plan import compile_plan

from .servers import HOST

Result = TypeVar("Result")
PARTS = {
    "connect": "connection",
    "wait": "from the question to the answer's head",
    "read": "the answer's body",
    "pack": "here: the question packed",
    "unpack": "here: the answer checked and unpacked",
    "sha256": "of which its seal",
    "unpack_question": "as the server: the question checked and unpacked",
    "plan": "as the server: its plan compiled",
    "pack_answer": "as the server: the answer packed",
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a server is asked: the text of it, the tensors beside it, and the plan's digest."""

    asked: Mapping[str, Any]
    tensors: Mapping[str, npt.NDArray[np.float32]]
    plan: str

    @property
    def message(self) -> bytes:
        """The body, of the media type MESSAGE, as `Cloud` sends it."""
        return message({**self.asked, "plan": self.plan}, self.tensors, half=False)


def exchanged(port: int, exchange: Exchange) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of an exchange by part, with what the server says of its own; and the bodies' bytes.

    beyond: all of it but the total that the server says.

    Raises:
        BenchmarkError: the server did not do it.
    """
    packing = time.perf_counter()
    body = exchange.message
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    began = time.perf_counter()
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected = time.perf_counter()
    connection.request("POST", "/v1/handoff", body, {"Content-Type": MESSAGE})
    answer = connection.getresponse()
    answered = time.perf_counter()
    received = answer.read()
    read = time.perf_counter()
    connection.close()
    if answer.status != 200:
        raise BenchmarkError("handoff", f"the server answered {answer.status}: {received.decode()[:500]}")
    Handover.from_bytes(received)
    unpacked = time.perf_counter()
    told = server_times(answer.headers.get("Server-Timing", ""))
    spans = {"connect": connected - began, "wait": answered - connected, "read": read - answered}
    parts = {name: seconds * 1e3 for name, seconds in spans.items()}
    parts["beyond"] = (unpacked - packing) * 1e3 - told["total"]
    parts |= {f"server: {name}": milliseconds for name, milliseconds in told.items()}
    return parts, {"sent_bytes": len(body), "received_bytes": len(received)}


def server_times(header: str) -> dict[str, float]:
    """Milliseconds by name, of a header `Server-Timing`."""
    pairs = [re.match(r"\s*([\w-]+)(?:;.*)?;\s*dur=([\d.]+)", one) for one in header.split(",")]
    return {found[1]: float(found[2]) for found in pairs if found}


def own_parts(pipe: Pipeline, exchange: Exchange, handover: Handover) -> dict[str, float]:
    """Milliseconds of what the two sides do besides waiting, done here, one after the other.

    handover: what is answered.
    """
    from tandemrt.serve.limits import Limits  # noqa: PLC0415 — of the extra `serve`
    from tandemrt.serve.protocol import asked_of, request_of  # noqa: PLC0415

    taken: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = work()
        taken[name] = (time.perf_counter() - began) * 1e3
        return result

    body = timed("pack", lambda: exchange.message)
    request = timed("unpack_question", lambda: request_of(*asked_of(body, MESSAGE), pipe.bundle.digest, Limits()))
    timed("plan", lambda: compile_plan(pipe.bundle.manifest, request.schedule))
    answer = timed("pack_answer", handover.to_bytes)
    timed("sha256", lambda: hashlib.sha256(answer).digest())
    timed("unpack", lambda: Handover.from_bytes(answer))
    return taken
