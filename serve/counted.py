"""Every request is counted by its endpoint and what became of it, also one that no endpoint answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .metrics import Metrics
from .problems import OUTCOME

UNKNOWN = "unknown"


class Counted:
    """Counts requests when they have been answered to the last byte, or are given up.

    routes: their paths are the endpoints' names; requests for other paths are counted together.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route], metrics: Metrics) -> None:
        self._app, self._routes, self._metrics = app, routes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = next((one.path for one in self._routes if one.matches(scope)[0] is not Match.NONE), UNKNOWN)
        scope[OUTCOME] = "ok"
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            scope[OUTCOME] = "cancelled"
            raise
        except Exception:
            scope[OUTCOME] = "failed"
            raise
        finally:
            self._metrics.requests.labels(endpoint, scope[OUTCOME]).inc()
