"""What goes wrong, as answers: a status, and a JSON body of OpenAI's shape, which names no path of this machine."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tandemrt.runtime.errors import ArgumentError, NonFiniteError

LOG = logging.getLogger("tandemrt.serve")
_MOST_CHARACTERS = 2000
# Where a request's scope says what became of it, for who counts them.
OUTCOME = "tandemrt.outcome"


class Problem(Exception):  # noqa: N818
    """An answer other than the one that was asked for.

    reason: what metrics count it as.
    """

    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        # What callers send may hold what UTF-8 has not, such as half of a surrogate pair.
        super().__init__(message.encode("utf-8", "backslashreplace").decode()[:_MOST_CHARACTERS])
        self.status, self.reason, self.headers = status, reason, dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to other processes whole."""
        return type(self), (self.status, self.reason, str(self), self.headers)

    @property
    def facts(self) -> dict[str, Any]:
        """What is told of it, in JSON's types."""
        return {"error": {"message": str(self), "type": self.reason, "param": None, "code": self.status}}

    def response(self) -> JSONResponse:
        return _Answer(self)


class _Answer(JSONResponse):
    """A problem's answer, which is its request's outcome."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.facts, problem.status, problem.headers)
        self._reason = problem.reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[OUTCOME] = self._reason
        await super().__call__(scope, receive, send)


def malformed(message: str) -> Problem:
    return Problem(400, "malformed", message)


def unauthorized() -> Problem:
    message = "The token is missing or wrong. Send it as `Authorization: Bearer TOKEN`."
    return Problem(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


def foreign(what: str) -> Problem:
    """Another site's page asks a server that wants no token, through a browser of this machine."""
    remedy = "Set a token so that others may ask."
    return Problem(403, "foreign", f"{what}. A server without a token is for this machine alone. {remedy}")


def unknown_model(name: str, own: str) -> Problem:
    return Problem(404, "unknown_model", f"model: unknown, got {name[:200]!r}, expected {own!r}.")


def conflict(message: str) -> Problem:
    return Problem(409, "conflict", message)


def slow(seconds: float) -> Problem:
    return Problem(408, "slow", f"body: did not come within {seconds:g} s.")


def too_large(limit: int) -> Problem:
    return Problem(413, "too_large", f"body: too large, expected at most {limit} bytes.")


def unsupported(got: str, expected: str) -> Problem:
    return Problem(415, "unsupported_media_type", f"Content-Type: got {got[:200]!r}, expected {expected}.")


def header_too_large(limit: int) -> Problem:
    return Problem(431, "header_too_large", f"header: too large, expected at most {limit} bytes.")


def unusable(message: str) -> Problem:
    return Problem(422, "unusable", message)


def busy(seconds: int) -> Problem:
    message = f"As many requests wait as may. Try again in {seconds} s."
    return Problem(429, "busy", message, {"Retry-After": str(seconds)})


def unready(why: str) -> Problem:
    return Problem(503, "unready", f"Not ready: {why}.", {"Retry-After": "5"})


def overdue(seconds: float) -> Problem:
    return Problem(504, "deadline", f"The request took longer than {seconds:g} s; its work was cancelled.")


def problem_of(error: Exception) -> Problem:
    """The answer to an error. One that is not the caller's is logged under an id, which is all that the caller sees."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ArgumentError):
        return unusable(str(error))
    if isinstance(error, NonFiniteError):
        return Problem(500, "not_finite", str(error))
    number = uuid.uuid4().hex
    LOG.error("%s: %s", number, error, exc_info=error)
    return Problem(500, "failed", f"The request failed. The server's log has the reason, under {number}.")
