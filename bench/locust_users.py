"""Users of a server, for an interpreter of its own: `python -m tandemrt.bench.locust_users < JOB.json > SEEN.json`.

Locust (`pip install "tandemrt[load]"`) runs them: each asks, checks the answer, and asks again; one that is told to try
again later does so then. JOB is `{"url", "token", "users", "seconds", "asked": {path: body}, "weights": {path: n}}`;
SEEN is of every answer a list: when it came (seconds since the beginning), milliseconds, path, outcome, bytes.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
from collections.abc import Mapping
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

from tandemrt.runtime import Handover
from tandemrt.runtime.errors import TandemError

HANDOFF, GENERATIONS = "/v1/handoff", "/v1/images/generations"
# Longer than a server lets a request run.
_TIMEOUT_S, _PAUSE_S = 900.0, 1.0
PNG = b"\x89PNG\r\n\x1a\n"


def outcome_of(path: str, asked: Mapping[str, Any], status: int, body: bytes) -> str:
    """What became of a request: `ok`, or else why not.

    `damaged` where the answer is none, `another` where it is to something else than was asked; else the status and the
    reason that the server gives.
    """
    try:
        if status != 200:
            return f"{status} {json.loads(body)['error']['type']}"
        if path == HANDOFF:
            made = Handover.from_bytes(body)
            same = (made.seed, made.step, made.plan) == (asked["seed"], asked["until"], asked["plan"])
        else:
            answer = json.loads(body)
            if not all(base64.b64decode(one["b64_json"]).startswith(PNG) for one in answer["data"]):
                return "damaged"
            same = answer["seeds"] == [asked["seed"]]
    except (ValueError, KeyError, TypeError, TandemError):
        return "damaged" if status == 200 else str(status)
    return "ok" if same else "another"


def seen_by_users(job: Mapping[str, Any]) -> list[tuple[float, float, str, str, int]]:
    """What all users saw, in order."""
    # First, as it exchanges sockets and threads for its own.
    from locust.env import Environment  # noqa: PLC0415, I001
    from locust.contrib.fasthttp import FastHttpUser  # noqa: PLC0415
    from gevent import sleep, spawn_later  # noqa: PLC0415

    seeds, seen = itertools.count(), []
    headers = {} if job["token"] is None else {"Authorization": f"Bearer {job['token']}"}

    def ask(user: Any, path: str) -> None:
        body, asked = {**job["asked"][path], "seed": next(seeds)}, perf_counter()
        with user.client.post(path, json=body, headers=headers, catch_response=True) as answer:
            content, answered = answer.content or b"", perf_counter()
            outcome = outcome_of(path, body, answer.status_code, content) if answer.status_code else "no answer"
            if outcome == "ok":
                answer.success()
            else:
                answer.failure(outcome)
            seen.append((answered - began, (answered - asked) * 1e3, path, outcome, len(content)))
        if outcome != "ok":
            after = (answer.headers or {}).get("Retry-After", "")
            sleep(float(after) if after.isdigit() else _PAUSE_S)

    class User(FastHttpUser):
        host = job["url"]
        network_timeout = connection_timeout = _TIMEOUT_S
        tasks: ClassVar[list[Any]] = [
            partial(ask, path=path) for path, weight in job["weights"].items() for _ in range(weight)
        ]

    environment = Environment(user_classes=[User])
    runner = environment.create_local_runner()
    began = perf_counter()
    runner.start(job["users"], spawn_rate=job["users"])
    spawn_later(job["seconds"], runner.quit)
    runner.greenlet.join()
    return seen


if __name__ == "__main__":
    json.dump(seen_by_users(json.load(sys.stdin)), sys.stdout)
