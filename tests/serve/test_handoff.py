"""`POST /v1/handoff`: the bits of a run in one process, and what is refused with which status."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tandemrt.runtime import Handover, Pipeline, TandemError
from tandemrt.runtime.cloud import JSON, MESSAGE, PROTOCOL
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.messages import packed
from tandemrt.runtime.plan import Plan, Schedule, compile_plan
from tandemrt.runtime.solvers import SOLVERS
from tandemrt.serve import work
from tandemrt.serve.limits import MOST_HISTORY, Limits

from .asking import TOKEN
from .conftest import serving

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}


def handed(client: httpx.Client, **asked: Any) -> Handover:
    answer = client.post("/v1/handoff", json={**JOB, **asked})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == MESSAGE
    return Handover.from_bytes(answer.content)


def message(handover: Handover, **asked: Any) -> bytes:
    facts = {**JOB, "start_step": handover.step, "plan": handover.plan, **asked}
    return packed({"state": handover.state}, {"protocol": PROTOCOL, "request": json.dumps(facts)})


def posted(client: httpx.Client, body: bytes, kind: str = JSON, **headers: str) -> tuple[int, str]:
    """The status and the message of an answer that is a problem."""
    answer = client.post("/v1/handoff", content=body, headers={"content-type": kind, **headers})
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    return answer.status_code, error["message"]


@pytest.mark.parametrize("solver", [None, "euler_a", "heun"])
def test_large_to_small_over_the_wire_is_that_of_one_process(
    solver: str | None, client: httpx.Client, pipe: Pipeline
) -> None:
    asked = {} if solver is None else {"solver": solver}
    rest = pipe(**JOB, **asked, start=handed(client, until=2, **asked))
    np.testing.assert_array_equal(rest.latents, pipe(**JOB, **asked).latents)


def test_a_state_is_gone_on_with(client: httpx.Client, pipe: Pipeline) -> None:
    answer = client.post(
        "/v1/handoff", content=message(pipe(**JOB, until=2).handover, until=5), headers={"content-type": MESSAGE}
    )
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(Handover.from_bytes(answer.content).state[0], pipe(**JOB).latents)


def runs_on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def test_a_plan_that_many_ask_for_is_compiled_once(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    on_a_loop: list[bool] = []

    def compiling(manifest: Manifest, schedule: Schedule) -> Plan:
        compiled.append(schedule.steps)
        on_a_loop.append(runs_on_a_loop())
        return compile_plan(manifest, schedule)

    monkeypatch.setattr(work, "compile_plan", compiling)
    plans = [handed(client, steps={"unet": steps}, seed=seed, until=1).plan for seed, steps in enumerate((6, 6, 7, 6))]
    assert compiled == [{"unet": 6}, {"unet": 7}]
    assert on_a_loop == [False, False]  # where others would wait meanwhile
    assert plans[0] == plans[1] == plans[3] != plans[2]


def test_half_the_bytes(client: httpx.Client, pipe: Pipeline) -> None:
    whole = client.post("/v1/handoff", json={**JOB, "until": 2})
    half = client.post("/v1/handoff", json={**JOB, "until": 2, "dtype": "float16"})
    state = Handover.from_bytes(half.content).state
    assert len(whole.content) - len(half.content) == 2 * state.size
    np.testing.assert_allclose(state, Handover.from_bytes(whole.content).state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("status", "told", "asked"),
    [
        (422, "until: missing", {}),
        (422, r"until: not usable, got 6, expected a whole number in 1\.\.5", {"until": 6}),
        (422, r"Expected `str \| array \| null`, got `int` - at `\$\.prompt`", {"prompt": 3}),
        (422, "unknown field `image`", {"image": "x.png"}),
        (422, "height: not usable, got 65", {"height": 65, "until": 1}),
        (422, "height, width: got 4194304 pixels, expected at most", {"height": 2048, "width": 2048, "until": 1}),
        (422, "steps: got 151, expected at most 150", {"steps": 151, "until": 1}),
        (422, "steps: got 100000, expected at most 150",  # a plan of which would take half a minute to compile
         {"steps": {"unet": 100_000, "unet_free": -1}, "solver_config": {"num_train_timesteps": 100_000}, "until": 1}),
        (422, "pictures: got 5, expected at most 4", {"num_images_per_prompt": 5, "until": 1}),
        (422, "prompt: got 16385 bytes, expected at most 16384", {"prompt": "x" * 16385, "until": 1}),
        (422, "steps: unknown denoiser, got 'unet_nowhere'", {"steps": {"unet_nowhere": 2}, "until": 1}),
        (422, "timeout: got 0, expected a number above 0", {"timeout": 0, "until": 1}),
        (404, "model: unknown, got 'other', expected 'bundle'", {"model": "other", "until": 1}),
        (409, "bundle: got 'abc', expected", {"bundle": "abc", "until": 1}),
        (409, "plan: got 'abc', expected", {"plan": "abc", "until": 1}),
        (504, r"longer than 1e-05 s; its work was cancelled", {"timeout": 1e-5, "steps": {"unet": 100}, "until": 100}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told(status: int, told: str, asked: Mapping[str, Any], client: httpx.Client) -> None:
    code, message = posted(client, json.dumps({**JOB, **asked}).encode())
    assert code == status
    assert re.search(told, message), message


@pytest.mark.parametrize(
    ("status", "told", "body", "kind"),
    [
        (400, "no JSON", b"{", JSON),
        (400, "no JSON", b"\xff\xfe", JSON),
        (400, "body: safetensors header size", b"not safetensors at all", MESSAGE),
        (400, "body: metadata", b"\x08\0\0\0\0\0\0\0{}      ", MESSAGE),
        (415, "Content-Type: got 'text/plain', expected application/json or", b"{}", "text/plain"),
        (422, "Expected `object`, got `array`", b"[]", JSON),
    ],
)  # fmt: skip
def test_bodies_that_are_none(status: int, told: str, body: bytes, kind: str, client: httpx.Client) -> None:
    code, message = posted(client, body, kind)
    assert (code, told in message) == (status, True), message


def test_a_body_ends_at_the_limit_however_it_comes(client: httpx.Client, pipe: Pipeline) -> None:
    limit = Limits().body_bytes(pipe.bundle.manifest)

    def chunks() -> Iterator[bytes]:
        for _ in range(limit // (1 << 16) + 1):
            yield b" " * (1 << 16)

    for body in (b" " * limit + b"{", chunks()):
        answer = client.post("/v1/handoff", content=body, headers={"content-type": JSON})
        assert answer.status_code == 413
        assert f"expected at most {limit} bytes" in answer.text


def history(manifest: Manifest, solver: str) -> int:
    """How many earlier predictions a solver keeps; -1 of one that the bundle does not take."""
    try:
        return compile_plan(manifest, Schedule(steps={"unet": 8}, solver=solver)).table.history
    except TandemError:
        return -1


def test_the_largest_state_that_is_allowed_can_be_sent(client: httpx.Client, pipe: Pipeline) -> None:
    manifest = pipe.bundle.manifest
    kept = {solver: history(manifest, solver) for solver in SOLVERS}
    solver = max(kept, key=lambda name: kept[name])
    assert 2 <= kept[solver] <= MOST_HISTORY
    asked = {"solver": solver, "steps": {"unet": 8}, "height": 1024, "width": 1024, "num_images_per_prompt": 4}
    plan = compile_plan(manifest, Schedule(steps={"unet": 8}, solver=solver))
    state = np.ones((1 + kept[solver], 4, 4, 128, 128), np.float32)
    body = message(Handover(state, 8, plan.digest, "", 7), until=8, **asked)
    assert len(body) > 3 << 20
    answer = client.post("/v1/handoff", content=body, headers={"content-type": MESSAGE})
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(Handover.from_bytes(answer.content).state, state)


def test_a_state_that_float16_does_not_hold_is_answered_in_float32(client: httpx.Client, pipe: Pipeline) -> None:
    end = pipe(**JOB, until=5).handover
    assert end is not None
    large = dataclasses.replace(end, state=np.full_like(end.state, 1e6))
    for handover, same in ((large, True), (end, False)):
        body = message(handover, until=5, dtype="float16")
        answer = client.post("/v1/handoff", content=body, headers={"content-type": MESSAGE})
        assert answer.status_code == 200, answer.text
        assert (Handover.from_bytes(answer.content).state == handover.state).all() == same


def test_a_longer_time_than_the_server_gives_is_the_servers(client: httpx.Client) -> None:
    assert handed(client, until=1, timeout=1e6).step == 1


def test_states_that_do_not_fit(client: httpx.Client, pipe: Pipeline) -> None:
    handover = pipe(**JOB, until=2).handover
    assert handover is not None
    code, told = posted(client, message(handover, until=5, guidance_scale=3.0), MESSAGE)
    assert (code, "plan: got" in told) == (409, True)
    code, told = posted(client, message(handover, until=5, start_step=None), MESSAGE)
    assert (code, "state: given without start_step" in told) == (422, True)
    code, told = posted(client, message(handover, until=5, start_step=-3), MESSAGE)
    assert (code, "start: step, got -3, expected 0..5, of the plan's steps" in told) == (422, True), told
    code, told = posted(client, message(handover, until=5, height=96), MESSAGE)
    assert (code, "start: shape" in told) == (422, True)
    spoilt = Handover(handover.state * np.float32(np.nan), handover.step, handover.plan, "", 7)
    code, told = posted(client, message(spoilt, until=5), MESSAGE)
    assert (code, told) == (422, "body: state: holds NaN or Inf, expected finite values.")
    code, told = posted(client, packed({"\ud800": handover.state}, {"protocol": PROTOCOL, "request": "{}"}), MESSAGE)
    assert (code, "body: tensors, got \"'\\\\ud800' in F32" in told) == (422, True), told
    code, told = posted(client, packed({}, {"protocol": PROTOCOL, "request": '{"prompt": "\ud800"}'}), MESSAGE)
    assert (code, "request: no JSON ('utf-8' codec can't encode" in told) == (400, True), told
    damaged = bytearray(message(handover, until=5))
    damaged[-1] ^= 1
    code, told = posted(client, bytes(damaged), MESSAGE)
    assert (code, "body: sha256" in told) == (400, True)


def test_the_same_key_gives_the_same_answer_once(client: httpx.Client) -> None:
    def asked(key: str, **more: Any) -> httpx.Response:
        body = {**JOB, "seed": None, "until": 1, **more}
        return client.post("/v1/handoff", json=body, headers={"Idempotency-Key": key})

    first, again = asked("one"), asked("one")
    assert first.content == again.content  # whose seed was drawn
    assert asked("two").content != first.content
    assert asked("one", until=2).status_code == 409
    assert asked("x" * 201).status_code == 400


def test_a_token_is_wanted(pipe: Pipeline) -> None:
    with serving(pipe, token=TOKEN) as client:
        for headers in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": TOKEN}):
            answer = client.post("/v1/handoff", content=b"{", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert handed(client, until=1).step == 1


def test_who_comes_when_as_many_wait_as_may_is_sent_away(pipe: Pipeline) -> None:
    slow = {**JOB, "steps": {"unet": 100}, "until": 100}
    with serving(pipe, Limits(waiting=1)) as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda seed: client.post("/v1/handoff", json={**slow, "seed": seed}), range(8)))
        codes = Counter(answer.status_code for answer in answers)
        assert set(codes) == {200, 429}
        assert codes[200] >= 2
        assert all(int(one.headers["retry-after"]) >= 1 for one in answers if one.status_code == 429)
        assert handed(client, until=1).step == 1
        assert 'tandemrt_requests_total{endpoint="/v1/handoff",outcome="busy"}' in client.get("/metrics").text
