"""`tandemrt serve`: a bundle over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandemrt.runtime import Cloud, Pipeline
from tandemrt.runtime.arguments import is_loopback, thread_count
from tandemrt.runtime.cli.cloud_options import add_cloud, cloud_from
from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.tokens import token_in_environment

from .limits import BODY_S, Limits
from .patience import PATIENCE_S, Patience
from .tokens import TokenFile

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

TOKEN = "TANDEMRT_TOKEN"
# Connections beside those whose requests run and wait: of pages, of metrics, and of clients that keep them.
_OTHERS = 256
_BOUNDED = ("running", "waiting", "batch", "steps", "pictures", "pixels")


@dataclass(frozen=True, slots=True)
class ServePlan:
    """Where a bundle is served, to whom, and how much of it.

    token: what requests bring; None for what is in token_file, and where there is none either, nothing.
    """

    bundle: Path
    target: str
    threads: int | None
    cache: Path | None
    host: str
    port: int
    token: str | None
    token_file: Path | None
    cloud: Cloud | None
    certificate: Path | None
    key: Path | None
    limits: Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt serve`."""
    parser.description = (
        "Serve a bundle: POST /v1/handoff runs the first steps for an edge device, POST /v1/images/generations paints "
        "whole pictures, and / is a page for people. Everybody on this machine may ask; with a token, in "
        f"${TOKEN} or a file, so may others. With --cloud the server is a device, that has another run some steps."
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    parser.add_argument("--target", default="auto", metavar="TARGET", help="backend:device[:precision] (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="how many CPU threads a model may use")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where engines are; see build-engine")
    where = parser.add_argument_group("where, and to whom")
    where.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone")
    where.add_argument("--port", type=int, default=8080, metavar="N", help="0 is any free one; default: 8080")
    where.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"what requests have to bring, read anew when it changes; or ${TOKEN}",
    )
    where.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM, with --tls-key, for HTTPS")
    where.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM")
    add_cloud(parser)
    bounds = parser.add_argument_group("how much")
    limits = Limits()
    told = {
        "running": "requests that run at once",
        "waiting": "requests that may wait",
        "batch": "pictures of requests that wait and then run as one; other batches change a picture's last bits",
        "steps": "rows of a plan",
        "pictures": "of a request",
        "pixels": "of a picture",
    }
    for name in _BOUNDED:
        default = getattr(limits, name)
        bounds.add_argument(f"--max-{name}", type=int, default=default, metavar="N", help=f"{told[name]} ({default})")
    bounds.add_argument(
        "--max-seconds", type=float, default=limits.seconds, metavar="S", help=f"of a request ({limits.seconds:g})"
    )


def plan_from_arguments(namespace: argparse.Namespace) -> ServePlan:
    """The command line as a plan.

    Raises:
        ArgumentError: a value cannot be used, or others than this machine could ask without a token.
    """
    thread_count("--threads", namespace.threads)
    file: Path | None = namespace.token_file
    token, cloud = token_in_environment(TOKEN) if file is None else None, cloud_from(namespace)
    if file is not None:
        TokenFile(file)
    if file is None and token is None and not is_loopback(namespace.host):
        remedy = f"Put a token into ${TOKEN} or a file for --token-file, or leave --host out."
        raise ArgumentError("--host", "others could ask, without a token", got=namespace.host, remedy=remedy)
    if (namespace.tls_certificate is None) != (namespace.tls_key is None):
        raise ArgumentError("--tls-certificate, --tls-key", "one without the other", remedy="Give both.")
    if not 0 <= namespace.port <= 65_535:
        raise ArgumentError("--port", "not usable", got=namespace.port, expected="a whole number in 0..65535")
    bounds = {name: getattr(namespace, f"max_{name}") for name in (*_BOUNDED, "seconds")}
    try:
        limits = Limits(**bounds)
    except ArgumentError as error:
        where = f"--max-{error.where}"
        raise ArgumentError(where, error.what, got=bounds[error.where], expected=error.expected) from error
    shared = {name: getattr(namespace, name) for name in ("bundle", "target", "threads", "cache", "host", "port")}
    tls = {"certificate": namespace.tls_certificate, "key": namespace.tls_key}
    return ServePlan(**shared, **tls, token=token, token_file=file, cloud=cloud, limits=limits)


def plan_facts(plan: ServePlan) -> dict[str, Any]:
    """The plan in JSON's types, without the token."""
    apart = ("token", "limits", "cloud")
    facts = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name not in apart}
    told = {name: None if value is None else str(value) for name, value in facts.items()}
    cloud = None if plan.cloud is None else plan.cloud.url
    needed = plan.token is not None or plan.token_file is not None
    return {**told, "cloud": cloud, "token": "needed" if needed else "none"}


def run(plan: ServePlan, reporter: Reporter) -> dict[str, Any]:
    """Serve until the process is told to end; what was taken until then is finished.

    Raises:
        BundleError, TargetError: as `Pipeline.open`.
        ArgumentError: the address cannot be had, or the certificate cannot be used.
    """

    from .app import application  # noqa: PLC0415
    from .served import name_of  # noqa: PLC0415

    with (
        _listening(plan) as listener,
        Pipeline.open(plan.bundle, plan.target, threads=plan.threads, cache=plan.cache, cloud=plan.cloud) as pipe,
    ):
        token = plan.token if plan.token_file is None else TokenFile(plan.token_file)
        config = server_config(application(pipe, plan.limits, token), plan.limits, host=plan.host, port=plan.port)
        config.ssl_certfile, config.ssl_keyfile = plan.certificate, plan.key
        _load(config)
        host = f"[{plan.host}]" if ":" in plan.host else plan.host
        scheme = "http" if plan.certificate is None else "https"
        reporter.note(f"serving {name_of(pipe.bundle.path)} at {scheme}://{host}:{listener.getsockname()[1]}")
        if plan.certificate is None and not is_loopback(plan.host):
            reporter.warn("without --tls-certificate the token, prompts and pictures go over the network in plain text")
        with _told_to_end():
            server_of(config, plan.limits).run(sockets=[listener])
    return {"served": str(plan.bundle)}


def server_of(config: uvicorn.Config, limits: Limits) -> uvicorn.Server:
    """A server that hangs up on clients who leave things half done, and, when it ends, on who asks for nothing."""
    import uvicorn  # noqa: PLC0415

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.patience = Patience(self.server_state.connections, BODY_S + limits.seconds + PATIENCE_S)
            self.watching = asyncio.ensure_future(self.patience.keep())

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            self.patience.ending = True
            try:
                await super().shutdown(sockets)
            finally:
                self.watching.cancel()

    return Server(config)


def _listening(plan: ServePlan) -> socket.socket:
    """A socket at the plan's address, which nobody else has."""
    family = socket.AF_INET6 if ":" in plan.host else socket.AF_INET
    try:
        return socket.create_server((plan.host, plan.port), family=family)
    except OSError as error:
        what = f"cannot be listened on ({error.strerror or error})"
        raise ArgumentError("--host, --port", what, got=f"{plan.host}:{plan.port}") from error


def _load(config: uvicorn.Config) -> None:
    """Read the certificate, before anything is served."""
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ArgumentError("--tls-certificate, --tls-key", f"cannot be used ({error})") from error


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Leave signals that end the server to it: it raises them again when it has ended, and ended well."""
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def server_config(app: Starlette, limits: Limits, *, host: str, port: int) -> uvicorn.Config:
    """How the application is served."""
    import uvicorn  # noqa: PLC0415

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        limit_concurrency=limits.running + limits.waiting + _OTHERS + 1,  # which it does not let be reached
        h11_max_incomplete_event_size=limits.header_bytes,
        access_log=False,  # it would hold prompts
        server_header=False,
        log_level="warning",
        timeout_keep_alive=math.ceil(PATIENCE_S),
        timeout_graceful_shutdown=math.ceil(BODY_S + limits.seconds + PATIENCE_S),
    )


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines."""
    yield f"served {result['served']}"
