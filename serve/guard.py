"""What is looked at before a body is read: the header's length, who asks, and how long the body is said to be."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tandemrt.runtime.arguments import is_loopback

from .problems import Problem, foreign, header_too_large, malformed, slow, too_large, unauthorized, unsupported
from .tokens import TokenFile

# The page holds nothing of the bundle's; it brings the token that is typed into it.
OPEN_PATHS = ("/", "/v2/health/live", "/v2/health/ready")
# What browsers say of a request that no other site's page makes.
_OWN_SITE = (b"same-origin", b"none")


class Guard:
    """Lets requests through that bring the token; the page, and those that ask whether the server lives, need none.

    token: None lets everybody through but other sites' pages, which browsers tell of. local: without a token, whether
        the server has to be asked by a name of this machine's own, which no name of another site's is that leads here.
    header_bytes: the longest header, of any request.
    """

    def __init__(self, app: ASGIApp, token: str | TokenFile | None, header_bytes: int, *, local: bool) -> None:
        self._app, self._token, self._header_bytes, self._local = app, token, header_bytes, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = await self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem.response()(scope, receive, send)

    async def _problem(self, scope: Scope) -> Problem | None:
        """Why a request does not come through."""
        # The parser refuses one that comes in parts, which is most of them.
        if _header_bytes(scope) > self._header_bytes:
            return header_too_large(self._header_bytes)
        headers = dict(scope["headers"])
        if self._token is None:
            return self._foreign(headers, scope["path"])
        if scope["path"] in OPEN_PATHS:
            return None
        token = await self._token.current() if isinstance(self._token, TokenFile) else self._token
        given = headers.get(b"authorization", b"")
        return None if hmac.compare_digest(given, f"Bearer {token}".encode()) else unauthorized()

    def _foreign(self, headers: dict[bytes, bytes], path: str) -> Problem | None:
        host = headers.get(b"host")
        if self._local and host is not None and not _is_own(host):
            return foreign(f"Host: got {host[:100].decode('latin-1')!r}, expected such as 127.0.0.1 or localhost")
        site = headers.get(b"sec-fetch-site", b"none")
        if site not in _OWN_SITE and path not in OPEN_PATHS:  # a link to the page is none of these
            return foreign(f"Sec-Fetch-Site: got {site[:100].decode('latin-1')!r}, expected same-origin")
        return None


def _is_own(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('ascii')}").hostname or "")
    except ValueError:  # no host, or none of ASCII
        return False


def _header_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) for name, value in scope["headers"])


def media_type(request: Request, allowed: tuple[str, ...]) -> str:
    """The body's media type, of those that are allowed; Problem 415 otherwise."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in allowed:
        raise unsupported(given, " or ".join(allowed))
    return given


async def body_of(request: Request, most_bytes: int, seconds: float) -> bytes:
    """The body, of so many bytes at most however long it says it is.

    Raises:
        Problem: it is longer, did not come within so many seconds, or the client left.
    """
    said = request.headers.get("content-length")
    if said is not None and (not said.isdigit() or int(said) > most_bytes):
        raise too_large(most_bytes) if said.isdigit() else malformed("Content-Length: no number.")
    try:
        return await asyncio.wait_for(_read(request, most_bytes), seconds)
    except (asyncio.TimeoutError, TimeoutError) as late:
        raise slow(seconds) from late
    except ClientDisconnect as gone:
        raise Problem(499, "client_left", "The client left.") from gone


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large(limit)
    return bytes(body)
