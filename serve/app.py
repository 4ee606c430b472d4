"""The application: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tandemrt.runtime import Pipeline
from tandemrt.runtime import Request as Painting

from .answers import Endpoint, Idempotent, answering
from .counted import Counted
from .guard import Guard
from .limits import HANGS_S, Limits
from .metrics import Metrics
from .problems import Problem
from .queue import Queue
from .served import Served
from .service import Service
from .tokens import TokenFile
from .work import Painter

# The page's style and script are within it, and its pictures are data; nothing comes from elsewhere.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'"
)
_WARM_UP = Painting(prompt="", seed=0)


def application(pipe: Pipeline, limits: Limits, token: str | TokenFile | None) -> Starlette:
    """A bundle's server, ready when it has painted its first picture; closing it lets what runs end.

    token: what every request brings; None for none, where it is asked by names of this machine's own alone.
    """
    metrics, served = Metrics(), Served.of(pipe)
    queue = Queue(pipe, limits, metrics, served.help)
    return application_of(queue, served, limits, token, metrics, local=token is None)


def application_of(
    painter: Painter,
    served: Served,
    limits: Limits,
    token: str | TokenFile | None,
    metrics: Metrics,
    *,
    local: bool = False,
) -> Starlette:
    """As `application`, with what a painter paints of what is served; local: see `Guard`."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        warming, asking = asyncio.ensure_future(painter.warm_up(_WARM_UP)), asyncio.ensure_future(served.keep_asking())
        try:
            yield
        finally:
            asking.cancel()
            painter.drain()
            await asyncio.wait([warming, asking], timeout=HANGS_S)
            await painter.close()

    routes = _routes(Service(served, painter, limits, Idempotent(limits.waiting)), metrics)
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Counted, routes=routes, metrics=metrics),
            Middleware(Guard, token=token, header_bytes=limits.header_bytes, local=local),
        ],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )


def _routes(service: Service, metrics: Metrics) -> list[Route]:
    """Which path is answered by what."""
    shown = Path(__file__).with_name("page.html").read_text("utf-8")

    async def page(_: Request) -> Response:
        return HTMLResponse(shown, headers={"Content-Security-Policy": _POLICY})

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def told(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def route(path: str, method: str, endpoint: Endpoint) -> Route:
        return Route(path, answering(endpoint), methods=[method])

    stream = route("/v1/images/stream", "GET", service.stream)
    stream.methods = {"GET"}  # HEAD, which Starlette adds, would paint what nobody is shown

    return [
        route("/", "GET", page),
        route("/v1/handoff", "POST", service.handoff),
        route("/v1/images/generations", "POST", service.generations),
        stream,
        route("/v2", "GET", service.server),
        route("/v2/health/live", "GET", live),
        route("/v2/health/ready", "GET", service.ready),
        route("/v2/models/{name}", "GET", service.model),
        route("/v2/models/{name}/ready", "GET", service.model_ready),
        route("/metrics", "GET", told),
    ]


async def _refused(_: Request, error: Exception) -> Response:
    """Where there is no such path, or it takes another method."""
    if not isinstance(error, HTTPException):
        raise error
    reason = {404: "unknown_path", 405: "unknown_method"}.get(error.status_code, "refused")
    return Problem(error.status_code, reason, f"{error.detail}.", error.headers).response()
