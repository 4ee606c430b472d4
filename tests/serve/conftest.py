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

from tandemrt.runtime import Pipeline
from tandemrt.serve.app import application
from tandemrt.serve.command import server_config, server_of
from tandemrt.serve.limits import Limits
from tandemrt.serve.tokens import TokenFile

from ..lacking import lacking
from ..runtime.tiny_families import write_tiny_control
from .asking import Pace
from .edge import ALONE, HERE

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
    ready: bool = True,
) -> Iterator[httpx.Client]:
    """A client of a server on any port that is free; ready: wait until the server is."""
    limits = limits or Limits()
    config = server_config(application(pipe, limits, token), limits, host="127.0.0.1", port=0)
    config.loop = "asyncio"  # also where uvloop is there, which the extra does not bring; test_process runs what is
    server = server_of(config, limits)
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


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[httpx.Client]:
    """A client of a server that gives up on requests soon."""
    with serving(pipe, Limits(seconds=5)) as opened:
        yield opened


@pytest.fixture(scope="module")
def allowed(pipe: Pipeline) -> tuple[Any, Any]:
    """The latents of both places, and of the device alone."""
    return pipe(**HERE).latents, pipe(**ALONE).latents


@pytest.fixture(scope="module")
def device(bundle: Path, client: httpx.Client) -> Iterator[httpx.Client]:
    """A client of a server that is a device of `client`'s."""
    with Pipeline.open(bundle, threads=1, cloud=str(client.base_url)) as edge, serving(edge) as opened:
        yield opened


@pytest.fixture(scope="module")
def paced(bundle: Path) -> Iterator[tuple[Pipeline, Pace]]:
    pace = Pace()
    with Pipeline.open(bundle, threads=1, observe=pace) as pipe:
        yield pipe, pace


@pytest.fixture
def pace(paced: tuple[Pipeline, Pace]) -> Iterator[Pace]:
    yield paced[1]
    paced[1].seconds = 0.0


@pytest.fixture
def slow(paced: tuple[Pipeline, Pace]) -> Pipeline:
    return paced[0]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(scope="module")  # its event loop would be in the way of others
def browser() -> Iterator[Any]:
    from .browsing import CHROMIUM, sync_api  # noqa: PLC0415 (which needs Playwright)

    with sync_api.sync_playwright() as playwright:
        if CHROMIUM is None and not Path(playwright.chromium.executable_path).exists():
            lacking("Chromium, on the PATH or of Playwright's own")
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """The page of a server, in a window of its own; no script may fail in it, and nothing break its policy."""
    from .browsing import RECORDED  # noqa: PLC0415

    contexts, failures = [], []

    def opening(client: httpx.Client, width: int = 1200, height: int = 900, **how: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **how))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(10_000)
        tab.on("pageerror", lambda error: failures.append(str(error)))
        tab.on("console", lambda said: failures.append(said.text) if "Security Policy" in said.text else None)
        tab.goto(str(client.base_url))
        tab.evaluate(RECORDED)
        return tab

    yield opening
    for context in contexts:
        context.close()
    assert failures == []
