"""A server of `tandemrt serve`, asked over HTTP to run a part of a plan: within its time, or not at all.

What goes wrong on the way is one CloudError, whose `reason` says what: the network is no place for other surprises.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
import numpy as np
import numpy.typing as npt

from .arguments import is_loopback
from .bounded_socket import Bounds
from .cloud_reasons import ANSWERED, refused
from .connections import MAX_ANSWER_BYTES, Connections, Question
from .errors import ArgumentError, CancelledError, CloudError, RequestError
from .handover import Handover, checked_digest, in_half
from .manifest import Component
from .messages import packed

T = TypeVar("T")
PROTOCOL = "tandemrt.handoff/1"
JSON, MESSAGE = "application/json", "application/x-safetensors"
# For how long a request may wait, where nobody says.
SECONDS = 30.0
RETRIES = 2
# So many failures in a row, and nobody is kept waiting for so many seconds.
BREAKING, BROKEN_S = 3, 30.0
_FIRST_PAUSE_S = 0.1


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

    url: such as `https://host:8080`. token: what it wants to see. seconds: how long a request may wait for it, all
    hand-overs and tries together. half: have states travel in float16, half the bytes, where that holds them.
    Which certificates are trusted is the system's to say, or `$SSL_CERT_FILE` and `$SSL_CERT_DIR` as they are now.

    Raises:
        ArgumentError: the address is none, or a token would go over the network in plain text.
    """

    def __init__(self, url: str, token: str | None = None, *, seconds: float = SECONDS, half: bool = False) -> None:
        https, host, port, self._path = _address(url)
        if token is not None and not https and not is_loopback(host):
            raise ArgumentError("cloud", "the token would go over the network in plain text", remedy="Use https.")
        if not 0 < seconds < float("inf"):
            raise ArgumentError("seconds", "not usable", got=seconds, expected="a finite number above 0")
        self.url, self.seconds, self.half = url, seconds, half
        self._connections = Connections(host, port, ssl.create_default_context() if https else None)
        self._authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._lock = threading.Lock()
        self._failures, self._broken_until = 0, 0.0

    def __repr__(self) -> str:
        return f"<Cloud {self.url}>"

    def close(self) -> None:
        """Hang up on the server, which may be asked again; what runs goes on."""
        self._connections.close()

    def bounds(self, cancelled: threading.Event | None = None, spent_s: float = 0.0) -> Bounds:
        """Those of a request, of whose time so many seconds are over; cancelled: ends it, from any thread."""
        return Bounds(time.monotonic() + self.seconds - spent_s, cancelled or threading.Event())

    def run(
        self,
        asked: Mapping[str, Any],
        tensors: Mapping[str, npt.NDArray[np.float32]],
        plan: str,
        bounds: Bounds | None = None,
    ) -> tuple[Handover, CloudTiming]:
        """The hand-over after a part of a plan.

        asked: what `/v1/handoff` is told, in JSON's types; `steps` in pairs, `until` and `seed` among it, and `models`
            where it matters which they are.
        tensors: the state to go on from, and texts that are encoded already. plan: the digest of the plan that the
            answer has to be of.
        bounds: when it ends; all of the cloud's seconds by default.

        Raises:
            CloudError: there was none in time; `timing` says what that took.
            CancelledError: it was cancelled.
        """
        within = bounds or self.bounds()
        facts = {**asked, "plan": plan}
        body = message(facts, tensors, half=self.half)
        digest = hashlib.sha256(body).hexdigest()
        headers = {"Content-Type": MESSAGE, "Idempotency-Key": uuid.uuid4().hex}
        began, steps, tries = time.monotonic(), facts["until"] - facts.get("start_step", 0), 0

        def handed() -> tuple[Handover, int]:
            nonlocal tries
            tries += 1
            answer = self._exchanged("POST", "/v1/handoff", body, headers, within)
            return self._checked(answer, facts, digest), len(answer)

        try:
            made, received = self.retried(handed, within)
        except CloudError as error:
            error.timing = CloudTiming(steps, time.monotonic() - began, tries, len(body) if tries else 0, 0)
            raise
        return made, CloudTiming(steps, time.monotonic() - began, tries, len(body), received, made.models)

    def described(self, bounds: Bounds) -> Described:
        """What the server's denoisers are, as it says itself when it is asked once.

        Raises:
            CloudError: it cannot be asked, or not in time.
            CancelledError: it was cancelled.
        """
        try:
            name = json.loads(self._exchanged("GET", "/v2", b"", {}, bounds))["model"]
            facts = json.loads(self._exchanged("GET", f"/v2/models/{quote(name)}", b"", {}, bounds))
            components = msgspec.convert(facts["components"], dict[str, Component])
            return Described(components, {one: checked_digest(facts["models"][one]) for one in components})
        except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError) as error:
            what = f"does not say what it serves ({error})"
            raise CloudError(self.url, "malformed", what, retryable=True) from error

    def retried(self, exchange: Callable[[], T], bounds: Bounds) -> T:
        """What an exchange gives, which is tried again where that may help and there is time.

        One that is cancelled, or that has no time from the first, says nothing of the server, and counts as nothing.
        """
        if bounds.over:
            raise self.ended(bounds)
        turn = self._turn()
        tries = 0
        while True:
            tries += 1
            try:
                made = exchange()
            except CloudError as error:
                whole = self._count(failed=error.reason not in ANSWERED)
                pause = max(error.pause, _FIRST_PAUSE_S * 2**tries * random.uniform(0.5, 1.5))
                if not (error.retryable and whole) or tries > RETRIES or pause >= bounds.left_s:
                    raise
                bounds.wait(pause)
                if bounds.stopped:
                    raise self.ended(bounds) from error
                if bounds.over:  # it waited for longer than it meant to
                    raise
                continue
            except BaseException:
                self._give_back(turn)
                raise
            self._count(failed=False)
            return made

    def ended(self, bounds: Bounds) -> CloudError | CancelledError:
        """What became of a wait that its bounds have ended."""
        if bounds.stopped:
            what = "the pipeline was closed" if bounds.closed.is_set() else "cancelled"
            return CancelledError("generation", f"{what} while the cloud ran a part of it")
        return CloudError(self.url, "deadline", f"did not answer within {self.seconds:g} s")

    def whole(self) -> None:
        """The server is known to help: forget how it failed, and let all ask it."""
        self._count(failed=False)

    def _turn(self) -> float:
        """Until when others are sent away, of time.monotonic, where this caller alone tries; 0 where all may ask.

        Raises:
            CloudError: the server is left alone, since it failed several times in a row. Then one caller tries, and the
                others are sent away until that has ended; or for as long again, if it hangs.
        """
        with self._lock:
            now = time.monotonic()
            if now < self._broken_until:
                left = self._broken_until - now
                what = f"failed {BREAKING} times in a row, and is left alone for {left:.0f} s more"
                raise CloudError(self.url, "broken", what)
            if self._failures >= BREAKING:
                self._broken_until = now + BROKEN_S
            return self._broken_until

    def _give_back(self, turn: float) -> None:
        """Let another try, if the turn is yet this caller's, who learned nothing of the server."""
        with self._lock:
            if turn == self._broken_until:
                self._broken_until = 0.0

    def _count(self, *, failed: bool) -> bool:
        """Count an exchange; whether the server may be asked again."""
        with self._lock:
            self._failures = self._failures + 1 if failed else 0
            whole = self._failures < BREAKING
            self._broken_until = 0.0 if whole else time.monotonic() + BROKEN_S
            return whole

    def _exchanged(self, method: str, path: str, body: bytes, headers: Mapping[str, str], bounds: Bounds) -> bytes:
        """The body of a good answer, which has all come within the bounds."""
        question = Question(method, self._path + path, body, {**self._authorization, **headers})
        try:
            answer = self._connections.answered(question, bounds)
        except ssl.SSLCertVerificationError as error:
            what = f"has a certificate that is not trusted ({error.verify_message})"
            raise CloudError(self.url, "untrusted", what) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if bounds.over:
                raise self.ended(bounds) from error
            what = f"cannot be reached, or broke off ({type(error).__name__}: {error})"
            raise CloudError(self.url, "unreachable", what, retryable=True) from error
        if len(answer.body) > MAX_ANSWER_BYTES:
            raise CloudError(self.url, "malformed", f"answered more than {MAX_ANSWER_BYTES} bytes")
        if answer.status != 200:
            raise refused(self.url, answer)
        return answer.body

    def _checked(self, answer: bytes, facts: Mapping[str, Any], digest: str) -> Handover:
        """The hand-over in an answer; CloudError where it is none, or not the one that was asked for.

        digest: the sha256 of what was asked.
        """
        try:
            handover = Handover.from_bytes(answer)
        except RequestError as error:
            self.close()  # what is damaged on one way may come whole on another
            raise CloudError(
                self.url, "malformed", f"answered what cannot be used ({error.without_remedy})", retryable=True
            ) from error
        seed = facts["seed"]
        ran = {name for name, _ in facts["steps"]}
        models = {name: one for name, one in facts.get("models", handover.models).items() if name in ran}
        if dict(handover.models) != models:
            raise CloudError(self.url, "conflict", f"ran other models, got {handover.models}, expected {models}")
        told = (handover.plan, handover.step, handover.seed, handover.request)
        wanted = (facts["plan"], facts["until"], tuple(seed) if isinstance(seed, list) else seed, digest)
        if told != wanted:
            raise CloudError(self.url, "malformed", f"answered for another request, {told} for {wanted}")
        return handover


def message(asked: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[np.float32]], *, half: bool) -> bytes:
    """What `/v1/handoff` is sent; asked: as of `Cloud.run`, with the plan's digest.

    Also where there are no tensors: a turned bit in a prompt's JSON would paint another picture.
    """
    state = in_half(tensors["state"]) if half and "state" in tensors else None
    sent: Mapping[str, npt.NDArray[Any]] = tensors if state is None else {**tensors, "state": state}
    facts = {**asked, "dtype": "float16" if half else "float32"}
    return packed(sent, {"protocol": PROTOCOL, "request": json.dumps(facts)})


def _address(url: str) -> tuple[bool, str, int, str]:
    """Whether it is https, the host, the port and what paths begin with; ArgumentError where it is no address."""
    if "@" in url.partition("//")[2].partition("/")[0]:  # which is not told: it may be a password
        remedy = "Leave what is before the @ out, and give a token."
        raise ArgumentError("cloud", "an address with a user's name", remedy=remedy)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        expected = "such as https://host:8080"
        raise ArgumentError("cloud", f"no address ({error})", got=url, expected=expected) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ArgumentError("cloud", "no address", got=url, expected="such as https://host:8080")
    https = parts.scheme == "https"
    return https, parts.hostname, port or (443 if https else 80), parts.path.rstrip("/")
