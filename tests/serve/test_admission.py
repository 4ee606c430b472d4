"""Who is painted for: when the server is ready, who waits, who is sent away, and whose work ends with him."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from tandemrt.runtime import Handover, Pipeline, Request
from tandemrt.runtime.cloud import JSON, MESSAGE, PROTOCOL
from tandemrt.runtime.messages import packed
from tandemrt.serve import tokens
from tandemrt.serve.app import application
from tandemrt.serve.limits import Limits
from tandemrt.serve.metrics import Metrics
from tandemrt.serve.problems import Problem
from tandemrt.serve.protocol import Asked
from tandemrt.serve.queue import Queue
from tandemrt.serve.served import Served
from tandemrt.serve.tokens import TokenFile
from tandemrt.serve.work import work_of

from .asking import TOKEN, Pace, asked, connection, measured, status_of, until
from .conftest import run_apart, serving

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}
LONG: dict[str, Any] = {**JOB, "steps": {"unet": 100}, "until": 100}
NEXT = "another-token-of-some-length"


def require_ended(client: httpx.Client, pace: Pace) -> None:
    """Nothing runs soon, long before it would have ended by itself."""
    until(lambda: measured(client, "tandemrt_running") == 0, 3.0)
    runs = pace.runs
    time.sleep(0.1)
    assert pace.runs == runs


def test_ready_when_the_first_picture_is_painted(slow: Pipeline, pace: Pace) -> None:
    with pace.held(), serving(slow, ready=False) as client:
        assert client.get("/v2/health/live").json() == {"live": True}
        for answer in (
            client.get("/v2/health/ready"),
            client.get("/v2/models/bundle/ready"),
            client.post("/v1/handoff", json={**JOB, "until": 1}),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "it has not painted its first picture yet" in answer.text
        pace.open.set()
        until(lambda: client.get("/v2/health/ready").status_code == 200)
        assert client.post("/v1/handoff", json={**JOB, "until": 1}).status_code == 200


def test_never_ready_when_the_first_picture_fails(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Pipeline.open(bundle, threads=1) as pipe:
        pipe.close()
        with serving(pipe, ready=False) as client:
            until(lambda: "its first picture failed" in client.get("/v2/health/ready").text)
            assert client.get("/v2/health/ready").status_code == 503
    assert "the first picture failed" in caplog.text


@pytest.mark.parametrize("path", ["/v1/handoff", "/v1/images/generations", "/v1/images/stream"])
def test_the_work_of_a_client_who_leaves_ends(path: str, slow: Pipeline, pace: Pace) -> None:
    with serving(slow) as client:
        pace.seconds, before = 0.05, pace.runs
        if path.endswith("stream"):
            opened = connection(client, f"GET {path}?prompt=red&steps=unet:100 HTTP/1.1")
        else:
            opened = asked(client, LONG if path == "/v1/handoff" else {"prompt": "red", "steps": 100}, path)
        until(lambda: pace.runs > before + 3)
        opened.close()
        require_ended(client, pace)
        assert pace.runs < before + 60
        assert client.post("/v1/handoff", json={**JOB, "until": 1}).status_code == 200


def test_who_leaves_while_he_waits_gives_up_his_place(slow: Pipeline, pace: Pace, threads: ThreadPoolExecutor) -> None:
    job = {**JOB, "until": 1}
    with serving(slow, Limits(waiting=1)) as client, pace.held():
        first = threads.submit(client.post, "/v1/handoff", json=job)
        until(lambda: measured(client, "tandemrt_running") == 1)
        for ask in (
            lambda: asked(client, job),
            lambda: connection(client, "GET /v1/images/stream?prompt=red HTTP/1.1"),
        ):
            leaving = ask()
            until(lambda: measured(client, "tandemrt_waiting") == 1)
            assert client.post("/v1/handoff", json=job).status_code == 429
            leaving.close()
            until(lambda: measured(client, "tandemrt_waiting") == 0)
        second = threads.submit(client.post, "/v1/handoff", json=job)
        until(lambda: measured(client, "tandemrt_waiting") == 1)
        pace.open.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        assert measured(client, "tandemrt_call_requests_count") == 2


def test_a_deadline_ends_the_work(slow: Pipeline, pace: Pace) -> None:
    with serving(slow) as client:
        pace.seconds, began = 0.05, time.monotonic()
        assert client.post("/v1/handoff", json={**LONG, "timeout": 0.3}).status_code == 504
        assert time.monotonic() - began < 3
        require_ended(client, pace)


def test_who_waits_has_a_deadline_too(slow: Pipeline, pace: Pace, threads: ThreadPoolExecutor) -> None:
    job = {**JOB, "until": 1}
    with serving(slow) as client, pace.held():
        first = threads.submit(client.post, "/v1/handoff", json=job)
        until(lambda: measured(client, "tandemrt_running") == 1)
        assert client.post("/v1/handoff", json={**job, "timeout": 0.2}).status_code == 504
        assert (measured(client, "tandemrt_waiting"), first.done()) == (0, False)
        pace.open.set()
        assert first.result().status_code == 200
        assert measured(client, "tandemrt_call_requests_count") == 1


def test_what_was_taken_is_painted_while_nothing_more_is(slow: Pipeline, pace: Pace) -> None:
    async def run() -> None:
        queue = Queue(slow, Limits(), Metrics())
        await queue.warm_up(Request(prompt="", seed=0))
        work = work_of(Asked(**JOB, until=1), {}, Served.of(slow), Limits())
        with pace.held():
            taken = [asyncio.ensure_future(queue.painted(work, 30)) for _ in range(2)]
            await asyncio.sleep(0)
            queue.drain()
            with pytest.raises(Problem, match="it is shutting down") as refused:
                await queue.painted(work, 30)
            assert refused.value.status == 503
        await queue.close()
        assert [one.result().handover.step for one in taken] == [1, 1]  # type: ignore[union-attr]

    run_apart(run())


def ran_after_another(
    client: httpx.Client, pace: Pace, threads: ThreadPoolExecutor, ask: list[Callable[[], Any]]
) -> list[Future[Any]]:
    """What is asked while another request runs, each when the one before waits."""
    with pace.held():
        threads.submit(client.post, "/v1/handoff", json={**JOB, "steps": 1, "until": 1})
        until(lambda: measured(client, "tandemrt_running") == 1)
        answers = []
        for count, one in enumerate(ask, start=1):
            answers.append(threads.submit(one))
            until(lambda count=count: measured(client, "tandemrt_waiting") == count)  # type: ignore[misc]
    return answers


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_those_who_wait_run_as_one(
    batch: int, slow: Pipeline, pipe: Pipeline, pace: Pace, threads: ThreadPoolExecutor
) -> None:
    jobs = [{**JOB, "prompt": prompt, "seed": seed} for seed, prompt in enumerate(("red", "blue", "red blue"))]
    jobs.insert(1, {**JOB, "guidance_scale": 2.0})
    with serving(slow, Limits(batch=batch)) as client:
        ask = [lambda job=job: client.post("/v1/handoff", json={**job, "until": 2}) for job in jobs]
        answers = [one.result() for one in ran_after_another(client, pace, threads, ask)]
        assert measured(client, "tandemrt_call_requests_count") == 1 + {1: 4, 2: 3, 4: 2}[batch]
        assert measured(client, "tandemrt_call_requests_sum") == 5
    for job, answer in zip(jobs, answers, strict=True):
        assert answer.status_code == 200, answer.text
        own, alone = Handover.from_bytes(answer.content), pipe(**job, until=2).handover
        assert alone is not None
        assert (own.seed, own.plan) == (alone.seed, alone.plan)
        if batch == 1:
            np.testing.assert_array_equal(own.state, alone.state)
        np.testing.assert_allclose(own.state, alone.state, rtol=1e-4, atol=1e-4)


def test_of_those_who_run_as_one_each_has_his_own_end(
    slow: Pipeline, pipe: Pipeline, pace: Pace, threads: ThreadPoolExecutor
) -> None:
    with serving(slow, Limits(batch=4)) as client:
        leaving = []
        ask: list[Callable[[], Any]] = [
            lambda: client.post("/v1/handoff", json=LONG),
            lambda: leaving.append(asked(client, {**LONG, "seed": 8})),
            lambda: client.post("/v1/handoff", json={**LONG, "seed": 9, "timeout": 0.8}),
        ]
        pace.seconds = 0.015
        answers = ran_after_another(client, pace, threads, ask)
        until(lambda: measured(client, "tandemrt_waiting") == 0)
        leaving[0].close()
        assert answers[2].result().status_code == 504
        assert measured(client, "tandemrt_running") == 1
        stayed = answers[0].result()
        assert stayed.status_code == 200
        assert measured(client, "tandemrt_call_requests_count") == 2
    own, alone = Handover.from_bytes(stayed.content), pipe(**LONG).handover
    assert alone is not None
    np.testing.assert_allclose(own.state, alone.state, rtol=1e-3, atol=1e-3)


def test_of_those_who_run_as_one_the_failure_of_one_is_his_own(
    slow: Pipeline, pipe: Pipeline, pace: Pace, threads: ThreadPoolExecutor
) -> None:
    made = pipe(**JOB, until=2).handover
    assert made is not None

    def message(state: Any) -> bytes:
        facts = {**JOB, "start_step": 2, "plan": made.plan, "until": 5}
        return packed({"state": state}, {"protocol": PROTOCOL, "request": json.dumps(facts)})

    bodies = [message(made.state), message(np.full_like(made.state, 3e38))]
    with serving(slow, Limits(batch=2)) as client:
        ask = [
            lambda body=body: client.post("/v1/handoff", content=body, headers={"content-type": MESSAGE})
            for body in bodies
        ]
        whole, failed = (one.result() for one in ran_after_another(client, pace, threads, ask))
        assert measured(client, "tandemrt_waiting") == measured(client, "tandemrt_running") == 0
    assert (whole.status_code, failed.status_code) == (200, 500)
    np.testing.assert_array_equal(Handover.from_bytes(whole.content).state[0], pipe(**JOB).latents)
    assert failed.json()["error"]["message"].startswith("step 2 (timestep 599, unet_free): NaN or Inf in the latent")


def test_the_token_is_wanted_before_the_body(pipe: Pipeline) -> None:
    head = f"POST /v1/handoff HTTP/1.1\r\nContent-Type: {JSON}\r\nContent-Length: 1000000"
    with serving(pipe, token=TOKEN) as client:
        assert status_of(connection(client, head)) == 401
        assert status_of(connection(client, f"{head}\r\nAuthorization: Bearer {TOKEN}x")) == 401


def test_a_body_that_does_not_come_is_not_waited_for(pipe: Pipeline) -> None:
    head = f"POST /v1/handoff HTTP/1.1\r\nContent-Type: {JSON}\r\nContent-Length: 10"
    with serving(pipe, Limits(seconds=0.5)) as client:
        assert status_of(connection(client, head, b"{")) == 408


def test_a_header_beyond_the_limit(pipe: Pipeline) -> None:
    limits = Limits()
    with serving(pipe) as client:
        opened = connection(client, f"GET / HTTP/1.1\r\nX-Long: {'x' * limits.header_bytes}")
        assert status_of(opened) in (400, 431)
        assert client.get("/").status_code == 200
    # Where all of it comes at once, the parser does not mind.
    own = TestClient(application(pipe, limits, None), "http://127.0.0.1")
    answer = own.get("/v2/health/live", headers={"X-Long": "x" * limits.header_bytes})
    assert (answer.status_code, answer.json()["error"]["type"]) == (431, "header_too_large")
    assert own.get("/v2/health/live", headers={"X-Long": "x" * (limits.header_bytes - 1000)}).status_code == 200
    half = "x" * (limits.header_bytes // 2)
    assert own.get("/v2/health/live", params={"x": half}, headers={"X-Long": half}).status_code == 431


def test_a_token_that_changes(tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_EVERY_S", 0.0)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n", "utf-8")

    def statuses() -> list[int]:
        return [client.get("/v2", headers={"authorization": f"Bearer {token}"}).status_code for token in (TOKEN, NEXT)]

    with serving(pipe, token=TokenFile(file)) as client:
        assert statuses() == [200, 401]
        file.write_text(NEXT, "utf-8")
        assert statuses() == [401, 200]
        for spoilt in ("", "short", "\xff" * 20):
            file.write_text(spoilt, "latin-1")
            assert statuses() == [401, 200]
        file.unlink()
        assert statuses() == [401, 200]
        file.write_text(TOKEN, "utf-8")
        assert statuses() == [200, 401]


def test_paths_and_methods_that_are_none(client: httpx.Client) -> None:
    answers = client.get("/v1/nowhere"), client.get("/v1/handoff")
    assert [one.status_code for one in answers] == [404, 405]
    assert [one.json()["error"]["type"] for one in answers] == ["unknown_path", "unknown_method"]
