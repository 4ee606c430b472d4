"""A server of `tandemrt serve`, asked over HTTP to run a part of a plan: within its time, or not at all.

What goes wrong on the way is one CloudError, whose `reason` says what: the network is no place for other surprises.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import random
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from .bounded_socket import BoundedSocket
from .errors import ArgumentError, CancelledError, CloudError, RequestError
from .handover import Handover, checked_digest
from .manifest import Component
from .messages import packed

T = TypeVar("T")
PROTOCOL = "tandemrt.handoff/1"
JSON, MESSAGE = "application/json", "application/x-safetensors"
RETRIES, TRIED_AGAIN = 2, frozenset({429, 502, 503, 504})
# So many failures in a row, and nobody is kept waiting for so many seconds.
BREAKING, BROKEN_S = 3, 30.0
MAX_ANSWER_BYTES = 64 << 20
_FIRST_PAUSE_S, _CHUNK = 0.1, 1 << 16
Bounds = tuple[float, threading.Event]  # when an exchange is cut, of time.monotonic, and what cuts it before
# Who answers so is there, and would answer so again.
_ANSWERED = frozenset({"unauthorized", "conflict", "refused", "untrusted"})
_REASONS = {401: "unauthorized", 409: "conflict", 429: "busy", 503: "unready", 504: "deadline"}


@dataclass(frozen=True, slots=True)
class CloudTiming:
    """What a hand-over took: seconds with all tries, how many those were, and the bytes of the last one's bodies.

    steps: how many the server was asked for. received_bytes: 0 where it did not help. models: as of `Handover`, those
        that ran them.
    """

    steps: int
    seconds: float
    tries: int
    sent_bytes: int
    received_bytes: int
    models: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Described:
    """A server's denoisers by name, and `Manifest.model_digest` of each."""

    components: Mapping[str, Component]
    models: Mapping[str, str]


class Cloud:
    """A server; safe to share between threads.

    url: such as `https://host:8080`. token: what it wants to see. seconds: how long one hand-over may take, its tries
    together. half: have states answered in float16, half the bytes.
    Which certificates are trusted is the system's to say, or `$SSL_CERT_FILE` and `$SSL_CERT_DIR` as they are now.

    Raises:
        ArgumentError: the address is none, or a token would go over the network in plain text.
    """

    def __init__(self, url: str, token: str | None = None, *, seconds: float = 30.0, half: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ArgumentError("cloud", "no address", got=url, expected="such as https://host:8080")
        if token is not None and parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise ArgumentError("cloud", "the token would go over the network in plain text", remedy="Use https.")
        if not 0 < seconds < float("inf"):
            raise ArgumentError("seconds", "not usable", got=seconds, expected="a finite number above 0")
        self.url, self.seconds, self.half = url, seconds, half
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if self._https else None
        self._authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._lock = threading.Lock()
        self._failures, self._broken_until = 0, 0.0

    def __repr__(self) -> str:
        return f"<Cloud {self.url}>"

    def run(
        self,
        asked: Mapping[str, Any],
        tensors: Mapping[str, npt.NDArray[np.float32]],
        plan: str,
        cancelled: threading.Event | None = None,
        spent: float = 0.0,
    ) -> tuple[Handover, CloudTiming]:
        """The hand-over after a part of a plan.

        asked: what `/v1/handoff` is told, `until` and `seed` among it, and `models` where it matters which they are.
        tensors: the state to go on from, and texts that are encoded already. plan: the digest of the plan that the
            answer has to be of.
        cancelled: ends it, from any thread. spent: how many of its seconds are over.

        Raises:
            CloudError: there was none in time; `timing` says what that took.
            CancelledError: it was cancelled.
        """
        facts = {**asked, "plan": plan, "dtype": "float16" if self.half else "float32"}
        # Also where there are no tensors: a turned bit in a prompt's JSON would paint another picture.
        body = packed(tensors, {"protocol": PROTOCOL, "request": json.dumps(facts)})
        headers = {"Content-Type": MESSAGE, "Idempotency-Key": uuid.uuid4().hex}
        cancelled = cancelled or threading.Event()
        began, steps = time.monotonic(), facts["until"] - facts.get("start_step", 0)
        ends, tries = began + self.seconds - spent, 0

        def handed() -> tuple[Handover, int]:
            nonlocal tries
            tries += 1
            answer = self._exchanged("POST", "/v1/handoff", body, headers, (ends, cancelled))
            return self._checked(answer, facts), len(answer)

        try:
            made, received = self._retried(handed, ends, cancelled)
        except CloudError as error:
            error.timing = CloudTiming(steps, time.monotonic() - began, tries, len(body) if tries else 0, 0)
            raise
        return made, CloudTiming(steps, time.monotonic() - began, tries, len(body), received, made.models)

    def described(self, cancelled: threading.Event, *, tries: int = 1 + RETRIES) -> Described:
        """What the server's denoisers are, as it says itself; cancelled: ends it, from any thread.

        Raises:
            CloudError: it cannot be asked, or not in time.
        """
        bounds = time.monotonic() + self.seconds, cancelled

        def described() -> Described:
            try:
                name = json.loads(self._exchanged("GET", "/v2", b"", {}, bounds))["model"]
                facts = json.loads(self._exchanged("GET", f"/v2/models/{quote(name)}", b"", {}, bounds))
                components = msgspec.convert(facts["components"], dict[str, Component])
                return Described(components, {one: checked_digest(facts["models"][one]) for one in components})
            except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError) as error:
                what = f"does not say what it serves ({error})"
                raise CloudError(self.url, "malformed", what, retryable=True) from error

        return self._retried(described, *bounds, most=tries)

    def _retried(
        self, exchange: Callable[[], T], ends: float, cancelled: threading.Event, *, most: int = 1 + RETRIES
    ) -> T:
        """What an exchange gives, which is tried again where that may help and there is time."""
        self._require_whole()
        tries = 0
        while True:
            tries += 1
            try:
                made = exchange()
            except CloudError as error:
                whole = self._count(failed=error.reason not in _ANSWERED)
                pause = max(error.pause, _FIRST_PAUSE_S * 2**tries * random.uniform(0.5, 1.5))
                if not (error.retryable and whole) or tries >= most or time.monotonic() + pause >= ends:
                    raise
                if cancelled.wait(pause):
                    raise _cancelled() from error
                if time.monotonic() >= ends:  # it waited for longer than it meant to
                    raise
                continue
            self._count(failed=False)
            return made

    def _require_whole(self) -> None:
        """Raise CloudError while the server is left alone, since it failed several times in a row."""
        with self._lock:
            left = self._broken_until - time.monotonic()
        if left > 0:
            what = f"failed {BREAKING} times in a row, and is left alone for {left:.0f} s more"
            raise CloudError(self.url, "broken", what)

    def _count(self, *, failed: bool) -> bool:
        """Count an exchange; whether the server may be asked again."""
        with self._lock:
            self._failures = self._failures + 1 if failed else 0
            if self._failures < BREAKING:
                return True
            self._broken_until = time.monotonic() + BROKEN_S
            # One try then decides whether it is whole.
            self._failures = BREAKING - 1
            return False

    def _exchanged(self, method: str, path: str, body: bytes, headers: Mapping[str, str], bounds: Bounds) -> bytes:
        """The body of a good answer, which has all come before the exchange is cut."""
        ends, cancelled = bounds
        with self._connection(ends, cancelled) as connection:
            connection.request(method, self._path + path, body, {**self._authorization, **headers})
            answer = connection.getresponse()
            received = bytearray()
            while chunk := answer.read(_CHUNK):
                received += chunk
                if len(received) > MAX_ANSWER_BYTES:
                    raise CloudError(self.url, "malformed", f"answered more than {MAX_ANSWER_BYTES} bytes")
            if answer.length:
                raise http.client.IncompleteRead(bytes(received), answer.length)
            if answer.status == 200:
                return bytes(received)
        raise _refused(self.url, answer, bytes(received))

    @contextmanager
    def _connection(self, ends: float, cancelled: threading.Event) -> Iterator[http.client.HTTPConnection]:
        """A connection that is cut, however slowly its bytes come; what else goes wrong on it is a CloudError."""
        left = ends - time.monotonic()
        if left <= 0:
            raise self._late()
        if self._tls is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=left, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=left)
        sock: socket.socket | None = None
        try:
            connection.connect()
            sock = connection.sock
            connection.sock = BoundedSocket(sock, ends, cancelled)
            yield connection
        except ssl.SSLCertVerificationError as error:
            what = f"has a certificate that is not trusted ({error.verify_message})"
            raise CloudError(self.url, "untrusted", what) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if cancelled.is_set():
                raise _cancelled() from error
            if time.monotonic() >= ends or isinstance(error, TimeoutError):
                raise self._late() from error
            what = f"cannot be reached, or broke off ({type(error).__name__}: {error})"
            raise CloudError(self.url, "unreachable", what, retryable=True) from error
        finally:
            connection.close()
            if sock is not None:
                sock.close()

    def _late(self) -> CloudError:
        return CloudError(self.url, "deadline", f"did not answer within {self.seconds:g} s")

    def _checked(self, answer: bytes, facts: Mapping[str, Any]) -> Handover:
        """The hand-over in an answer; CloudError where it is none, or not the one that was asked for."""
        try:
            handover = Handover.from_bytes(answer)
        except RequestError as error:
            raise CloudError(
                self.url, "malformed", f"answered what cannot be used ({error})", retryable=True
            ) from error
        told = (handover.plan, handover.step, handover.seed)
        seed = facts["seed"]
        wanted = (facts["plan"], facts["until"], tuple(seed) if isinstance(seed, list) else seed)
        if told != wanted:
            raise CloudError(self.url, "malformed", f"answered for another request, {told} for {wanted}")
        models = dict(handover.models)
        if models != facts.get("models", models):
            what = f"ran other models, got {models}, expected {facts['models']}"
            raise CloudError(self.url, "conflict", what)
        return handover


def _refused(url: str, answer: http.client.HTTPResponse, body: bytes) -> CloudError:
    """What an answer other than 200 means."""
    try:
        said = str(json.loads(body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = answer.reason
    after = answer.headers.get("Retry-After", "")
    pause = float(after) if after.isascii() and after.isdigit() and len(after) < 6 else 0.0
    reason = _REASONS.get(answer.status, "refused" if answer.status < 500 else "failed")
    return CloudError(
        url, reason, f"answered {answer.status}: {said}", retryable=answer.status in TRIED_AGAIN, pause=pause
    )


def _cancelled() -> CancelledError:
    return CancelledError("generation", "cancelled while the cloud ran a part of it")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
