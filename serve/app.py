"""The application: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tandemrt.runtime import Pipeline
from tandemrt.runtime import Request as Painting
from tandemrt.runtime.cloud import PROTOCOL

from .answers import Endpoint, Idempotent, answering
from .guard import Guard
from .limits import Limits
from .metrics import Metrics
from .problems import Problem, unready
from .queue import Queue
from .served import Served
from .service import Service
from .tokens import TokenFile
from .work import Painter

# The page's style and script are within it, and its pictures are data; nothing comes from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
_WARM_UP = Painting(prompt="", seed=0)


def application(pipe: Pipeline, limits: Limits, token: str | TokenFile | None) -> Starlette:
    """A bundle's server, ready when it has painted its first picture; closing it lets what runs end.

    token: what every request brings; None for none.
    """
    metrics = Metrics()
    return application_of(Queue(pipe, limits, metrics), Served.of(pipe), limits, token, metrics)


def application_of(
    painter: Painter, served: Served, limits: Limits, token: str | TokenFile | None, metrics: Metrics
) -> Starlette:
    """As `application`, with what a painter paints of what is served."""
    shown = Path(__file__).with_name("page.html").read_text("utf-8")
    service = Service(served, painter, limits, Idempotent())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(painter.warm_up(_WARM_UP))
        try:
            yield
        finally:
            painter.drain()
            await asyncio.wait([warming])
            await painter.close()

    async def page(_: Request) -> Response:
        return HTMLResponse(shown, headers={"Content-Security-Policy": _POLICY})

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_: Request) -> Response:
        if painter.unready:
            raise unready(painter.unready)
        return JSONResponse({"ready": True})

    async def server(_: Request) -> Response:
        version = metadata.version("tandemrt")
        return JSONResponse(
            {"name": "tandemrt", "version": version, "extensions": [PROTOCOL], "model": service.served.name}
        )

    async def model(request: Request) -> Response:
        service.served.require(request.path_params["name"])
        bounds = {name: getattr(limits, name) for name in ("steps", "pictures", "pixels", "prompt_bytes")}
        return JSONResponse({**service.served.facts, "limits": bounds})

    async def model_ready(request: Request) -> Response:
        service.served.require(request.path_params["name"])
        return await ready(request)

    async def told(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def route(path: str, method: str, endpoint: Endpoint) -> Route:
        return Route(path, answering(path, metrics, endpoint), methods=[method])

    return Starlette(
        routes=[
            route("/", "GET", page),
            route("/v1/handoff", "POST", service.handoff),
            route("/v1/images/generations", "POST", service.generations),
            route("/v1/images/stream", "GET", service.stream),
            route("/v2", "GET", server),
            route("/v2/health/live", "GET", live),
            route("/v2/health/ready", "GET", ready),
            route("/v2/models/{name}", "GET", model),
            route("/v2/models/{name}/ready", "GET", model_ready),
            route("/metrics", "GET", told),
        ],
        middleware=[Middleware(Guard, token=token, header_bytes=limits.header_bytes)],
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )


async def _refused(_: Request, error: Exception) -> Response:
    """Where there is no such path, or it takes another method."""
    if not isinstance(error, HTTPException):
        raise error
    reason = {404: "unknown_path", 405: "unknown_method"}.get(error.status_code, "refused")
    return Problem(error.status_code, reason, f"{error.detail}.", error.headers).response()
