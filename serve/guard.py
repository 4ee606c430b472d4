"""What is looked at before a body is read: the header's length, the token, and how long the body is said to be."""

from __future__ import annotations

import asyncio
import hmac

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .limits import Limits
from .problems import Problem, header_too_large, malformed, slow, too_large, unauthorized, unsupported
from .tokens import TokenFile

# The page holds nothing of the bundle's; it brings the token that is typed into it.
OPEN_PATHS = ("/", "/v2/health/live", "/v2/health/ready")


class Guard:
    """Lets requests through that bring the token; the page, and those that ask whether the server lives, need none.

    token: None lets everybody through. header_bytes: the longest header, of any request.
    """

    def __init__(self, app: ASGIApp, token: str | TokenFile | None, header_bytes: int) -> None:
        self._app, self._token, self._header_bytes = app, token, header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem.response()(scope, receive, send)

    def _problem(self, scope: Scope) -> Problem | None:
        """Why a request does not come through."""
        # The parser refuses one that comes in parts, which is most of them.
        if _header_bytes(scope) > self._header_bytes:
            return header_too_large(self._header_bytes)
        token = self._token.token if isinstance(self._token, TokenFile) else self._token
        if token is None or scope["path"] in OPEN_PATHS:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        return None if hmac.compare_digest(given, f"Bearer {token}".encode()) else unauthorized()


def _header_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) for name, value in scope["headers"])


def media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """The body's media type, of those that are allowed; Problem 415 otherwise."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        raise unsupported(given, " or ".join(allowed))
    return given


async def body_of(request: Request, limits: Limits) -> bytes:
    """The body, within the limits however long it says it is.

    Raises:
        Problem: it is longer, did not come in the time that a request may take, or the client left.
    """
    said, limit = request.headers.get("content-length"), limits.body_bytes
    if said is not None and (not said.isdigit() or int(said) > limit):
        raise too_large(limit) if said.isdigit() else malformed("Content-Length: no number.")
    try:
        return await asyncio.wait_for(_read(request, limit), limits.seconds)
    except (asyncio.TimeoutError, TimeoutError) as late:
        raise slow(limits.seconds) from late
    except ClientDisconnect as gone:
        raise Problem(499, "client_left", "The client left.") from gone


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large(limit)
    return bytes(body)
