"""A server on a port of this machine, in a thread, as `tandemrt serve` runs it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from tandemrt.runtime import Pipeline
from tandemrt.serve.app import application
from tandemrt.serve.command import server_config
from tandemrt.serve.limits import Limits
from tandemrt.serve.tokens import TokenFile

from ..runtime.tiny_families import write_tiny_control

Serve = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    write_tiny_control(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as pipeline:
        yield pipeline


@contextmanager
def serving(
    pipe: Pipeline,
    limits: Limits | None = None,
    token: str | TokenFile | None = None,
    *,
    port: int | None = 0,
    ready: bool = True,
) -> Iterator[httpx.Client]:
    """A client of a server; port: 0 for any. ready: wait until that is."""
    limits = limits or Limits()
    config = server_config(application(pipe, limits, token), limits, host="127.0.0.1", port=port or 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while ready and client.get("/v2/health/ready").status_code != 200:
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join()


def run_apart(work: Coroutine[Any, Any, None]) -> None:
    """Run it on a thread of its own: a browser's loop may run on this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


@pytest.fixture(scope="module")
def client(pipe: Pipeline) -> Iterator[httpx.Client]:
    with serving(pipe) as opened:
        yield opened
