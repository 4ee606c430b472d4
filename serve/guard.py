"""What is looked at before a body is read: the token, and how long the body is said to be; and a bounded body."""

from __future__ import annotations

import hmac

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .problems import Problem, malformed, too_large, unauthorized, unsupported

# The page holds nothing of the bundle's; it brings the token that is typed into it.
OPEN_PATHS = ("/", "/v2/health/live", "/v2/health/ready")


class Guard:
    """Lets requests through that bring the token; the page, and those that ask whether the server lives, need none.

    token: None lets everybody through.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._expected is None:
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        else:
            await unauthorized().response()(scope, receive, send)


def media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """The body's media type, of those that are allowed; Problem 415 otherwise."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        raise unsupported(given, " or ".join(allowed))
    return given


async def body_of(request: Request, limit: int) -> bytes:
    """The body, of at most so many bytes, however long it says it is.

    Raises:
        Problem: it is longer, or the client left.
    """
    said = request.headers.get("content-length")
    if said is not None and (not said.isdigit() or int(said) > limit):
        raise too_large(limit) if said.isdigit() else malformed("Content-Length: no number.")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
    except ClientDisconnect as gone:
        raise Problem(499, "client_left", "The client left.") from gone
    return bytes(body)
