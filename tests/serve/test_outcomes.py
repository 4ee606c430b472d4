"""Metrics count every request by what became of it, to the last byte of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tandemrt.runtime import Pipeline, Request, StepEvent
from tandemrt.runtime.output import RowTiming
from tandemrt.runtime.plan import RowGuidance
from tandemrt.serve import events, service
from tandemrt.serve.app import application_of
from tandemrt.serve.limits import Limits
from tandemrt.serve.metrics import Metrics
from tandemrt.serve.problems import OUTCOME, overdue
from tandemrt.serve.queue import Queue
from tandemrt.serve.served import Served

from .asking import TOKEN, Pace, connection, counted, measured, until
from .conftest import run_apart, serving

STREAM = "/v1/images/stream"
ASKED = {"prompt": "red", "steps": "unet:2,unet_free:3", "seed": "7"}


def test_what_no_endpoint_answers_is_counted(pipe: Pipeline) -> None:
    limits = Limits(header_bytes=2000)
    with serving(pipe, limits, TOKEN) as client:
        assert client.get("/v2/models/bundle").status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert client.get("/v1/nowhere").status_code == 404
        assert client.get("/v1/nowhere/else").status_code == 404
        assert client.get("/v1/handoff").status_code == 405
        assert client.post("/v1/handoff", content=b"{}").status_code == 415
        until(lambda: counted(client, "/v1/handoff", "unsupported_media_type") == 1)
        assert counted(client, "/v2/models/{name}", "unauthorized") == 1
        assert counted(client, "unknown", "unknown_path") == 2
        assert counted(client, "/v1/handoff", "unknown_method") == 1


def test_a_stream_is_what_it_comes_to(
    slow: Pipeline, pace: Pace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(slow) as client:
        assert "event: picture" in client.get(STREAM, params=ASKED).text
        assert client.get(STREAM, params={**ASKED, "steps": "unet:0"}).status_code == 422
        until(lambda: (counted(client, STREAM, "ok"), counted(client, STREAM, "unusable")) == (1, 1))

        pace.seconds, before = 0.05, pace.runs
        opened = connection(client, f"GET {STREAM}?prompt=red&steps=unet:100 HTTP/1.1")
        until(lambda: pace.runs > before + 3)
        opened.close()
        until(lambda: counted(client, STREAM, "client_left") == 1)
        pace.seconds = 0.0

        def fail(*_: Any, **_options: Any) -> list[str]:
            raise RuntimeError("no picture")

        monkeypatch.setattr(service, "pictures_of", fail)
        assert "event: error" in client.get(STREAM, params=ASKED).text
        until(lambda: counted(client, STREAM, "failed") == 1)
        assert counted(client, STREAM, "ok") == 1
    assert "no picture" in caplog.text


def test_what_the_server_gives_up_is_counted(slow: Pipeline, pace: Pace) -> None:
    """As a request for which it does not wait any longer when it ends."""

    async def run() -> None:
        metrics, limits = Metrics(), Limits()
        queue = Queue(slow, limits, metrics)
        await queue.warm_up(Request(prompt="", seed=0))
        app = application_of(queue, Served.of(slow), limits, None, metrics, local=True)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            with pace.held():
                answer = asyncio.ensure_future(client.get(STREAM, params=ASKED))
                while value(metrics, "tandemrt_running") == 0:
                    await asyncio.sleep(0.01)
                answer.cancel()
                await asyncio.wait([answer])
        await queue.close()
        assert value(metrics, "tandemrt_requests_total", endpoint=STREAM, outcome="cancelled") == 1

    def value(metrics: Metrics, name: str, **labels: str) -> float:
        return metrics.registry.get_sample_value(name, labels) or 0.0

    run_apart(run())


def row(number: int) -> StepEvent:
    timing = RowTiming("unet", 1.0, 1.0, RowGuidance(True, "batched", "as asked"))
    return StepEvent(number, 150, number, 0.0, timing, (Image.new("RGB", (8, 8)),))


async def ten_rows(seen: Callable[[Any], None]) -> Any:
    for number in range(10):
        seen(row(number))
    raise overdue(1)


def test_who_reads_late_is_given_the_last_preview_alone() -> None:
    async def run() -> None:
        scope: dict[str, Any] = {}
        told: AsyncGenerator[bytes, None] = events._events(scope, ten_rows, lambda _: [])
        texts = [one.decode() async for one in told]
        assert [text.split("\n")[0] for text in texts] == ["event: step"] * 10 + ["event: error"]
        assert ['"previews":[]' in text for text in texts[:10]] == [True] * 9 + [False]
        assert scope[OUTCOME] == "deadline"

        ahead: AsyncGenerator[bytes, None] = events._events(scope, one_by_one, lambda _: [])
        texts = [one.decode() async for one in ahead]
        assert ['"previews":[]' in text for text in texts[:3]] == [False] * 3

    async def one_by_one(seen: Callable[[Any], None]) -> Any:
        for number in range(3):
            seen(row(number))
            await asyncio.sleep(0.05)
        raise overdue(1)

    run_apart(run())


def test_what_is_served_is_told_as_the_open_inference_protocol_does(client: httpx.Client, pipe: Pipeline) -> None:
    facts = client.get("/v2/models/bundle").json()
    assert facts["versions"] == [pipe.bundle.digest]
    assert {"name": "state", "datatype": "FP32", "shape": [-1, -1, 4, -1, -1]} in facts["inputs"]
    assert [one["name"] for one in facts["outputs"]] == ["state"]


@pytest.mark.parametrize("path", [".", "unet/.."])
def test_a_bundle_that_is_served_from_within_has_its_folders_name(
    path: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle)
    with Pipeline.open(path, threads=1) as pipe:
        assert Served.of(pipe).name == bundle.name


def test_who_asks_for_a_streams_header_has_nothing_painted(client: httpx.Client) -> None:
    calls = measured(client, "tandemrt_call_requests_count")
    answer = client.head(STREAM, params=ASKED)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert client.head("/").status_code == 200
    assert measured(client, "tandemrt_call_requests_count") == calls
