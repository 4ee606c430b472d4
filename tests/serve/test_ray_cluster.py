"""A bundle on three nodes of Ray: the pictures of one process over the same HTTP, also while a node is killed.

`scripts/test --deep -n 0 tests/serve/test_ray_cluster.py`, with extra `ray`, as root: the nodes are in a network
namespace of their own.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tandemrt.runtime import Cloud, Handover, Pipeline

from ..lacking import lacking
from ..runtime.tiny_bundle import write_tiny_bundle
from .ray_cluster import Cluster, cluster, config_of, loopback_alone, on_two_nodes
from .test_ray import picture

pytestmark = [pytest.mark.deep, pytest.mark.slow]
if find_spec("ray") is None:
    lacking('Ray: pip install "tandemrt[ray]"')

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_small": 3}, "seed": 7}
TANDEM: dict[str, Any] = {**JOB, "steps": {"cloud:unet": 2, "unet_small": 3}}
ALONE: dict[str, Any] = {**JOB, "steps": {"unet_small": 5}}
SECONDS = 10.0
# A part is on two nodes, and comes back on the third.
DEPLOYMENTS = on_two_nodes("text", "unet", "unet-unconditional", "unet_small", "decoder")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def up(bundle: Path) -> Iterator[Cluster]:
    try:
        with loopback_alone(), cluster() as one:
            limits = {"running": 8, "waiting": 8, "seconds": SECONDS}
            one.deploy(config_of(bundle, DEPLOYMENTS, branches="unet", limits=limits))
            yield one
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def client(up: Cluster) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {up.token}"}
    with httpx.Client(base_url=up.url, headers=headers, timeout=30, limits=httpx.Limits(max_connections=64)) as opened:
        yield opened


def in_one_process(pipe: Pipeline, **asked: Any) -> Handover:
    """The state of JOB where the large denoiser's branches ran apart, as its replicas do."""
    job = {**JOB, **asked}
    first, rest = job["steps"].values()
    large = pipe(**job, placement="sequential", until=first).handover
    handover = pipe(**job, start=large, until=first + rest).handover
    assert handover is not None
    return handover


def test_pictures_are_those_of_one_process(client: httpx.Client, pipe: Pipeline) -> None:
    for asked in ({}, {"negative_prompt": "blue"}, {"seed": 8}):
        handed = client.post("/v1/handoff", json={**JOB, **asked, "until": 5})
        assert handed.status_code == 200, handed.text
        wanted = in_one_process(pipe, **asked)
        np.testing.assert_array_equal(Handover.from_bytes(handed.content).state, wanted.state)
        painted = client.post("/v1/images/generations", json={**JOB, **asked})
        assert picture(painted) == pipe(**{**JOB, **asked}, start=wanted).images[0].tobytes()


def test_a_device_goes_on_from_the_cluster(up: Cluster, bundle: Path, pipe: Pipeline, client: httpx.Client) -> None:
    with Pipeline.open(bundle, threads=1, cloud=Cloud(up.url, up.token, seconds=SECONDS)) as edge:
        output = edge(**TANDEM)
    assert output.degraded == ""
    np.testing.assert_array_equal(output.latents, in_one_process(pipe).state[0])


def test_the_same_surface(client: httpx.Client) -> None:
    paths = ("/", "/v2", "/v2/health/live", "/v2/models/bundle", "/v2/models/bundle/ready", "/metrics")
    assert [client.get(path).status_code for path in paths] == [200] * len(paths)
    with client.stream("GET", "/v1/images/stream", params={"prompt": "red", "steps": "5", "previews": 5}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("event: ")]
    assert Counter(lines) == {"event: step": 5, "event: stage": 1, "event: picture": 1}
    refused = client.post("/v1/handoff", json={**JOB, "until": 1}, headers={"authorization": "Bearer no"})
    assert refused.status_code == 401
    bad = client.post("/v1/handoff", json={**JOB, "until": 1, "height": 65})
    assert (bad.status_code, bad.json()["error"]["type"]) == (422, "unusable")


def test_who_comes_when_too_many_wait_is_sent_away(client: httpx.Client) -> None:
    slow = {**JOB, "steps": {"unet_small": 150}, "until": 150}
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda seed: client.post("/v1/handoff", json={**slow, "seed": seed}), range(32)))
    codes = Counter(answer.status_code for answer in answers)
    assert codes[429] >= 1
    assert set(codes) <= {200, 429, 504}, codes
    assert all(int(one.headers["retry-after"]) >= 1 for one in answers if one.status_code == 429)


def test_who_leaves_and_who_is_late_leave_nothing_behind(client: httpx.Client) -> None:
    slow = {**JOB, "steps": {"unet_small": 150}, "until": 150}
    for _ in range(4):
        answer = client.post("/v1/handoff", json={**slow, "timeout": 0.05})
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline")
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/handoff", json=slow, timeout=0.05)
    began = time.monotonic()
    assert client.post("/v1/handoff", json={**JOB, "until": 5}).status_code == 200
    assert time.monotonic() - began < 5


def test_a_branch_that_hangs_ends_with_its_request(up: Cluster, client: httpx.Client) -> None:
    on_nodes = [one for name in up.nodes for one in up.parts(name)]
    branches = [pid for part, pid in on_nodes if part == "unet-unconditional"]
    assert len(branches) == 2
    for pid in branches:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = client.post("/v1/handoff", json={**JOB, "until": 2, "timeout": 2})
        took = time.monotonic() - began
    finally:
        for pid in branches:
            os.kill(pid, signal.SIGCONT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline")
    assert took < 3
    assert client.post("/v1/handoff", json={**JOB, "until": 5}).status_code == 200
    assert [one for name in up.nodes for one in up.parts(name)] == on_nodes


def test_a_node_is_killed_under_load(up: Cluster, client: httpx.Client, bundle: Path, pipe: Pipeline) -> None:
    long = {"steps": {"unet": 25, "unet_small": 5}}
    wanted, alone = in_one_process(pipe, **long), pipe(**ALONE)
    tandem = in_one_process(pipe)
    # Of the two replicas that requests are with most of the time, and wait for, one at least is not on the head.
    on_nodes = {name: [part for part, _ in up.parts(name)] for name in ("first", "second")}
    node, parts = next((name, parts) for name, parts in on_nodes.items() if "unet" in parts)
    seen: list[tuple[str, float]] = []
    ended = threading.Event()

    def asking() -> None:
        while not ended.is_set():
            began = time.monotonic()
            answer = client.post("/v1/handoff", json={**JOB, **long, "until": 30, "timeout": SECONDS})
            took = time.monotonic() - began
            if answer.status_code == 200:
                np.testing.assert_array_equal(Handover.from_bytes(answer.content).state, wanted.state)
                seen.append(("ok", took))
            else:
                assert answer.status_code in (429, 503, 504), answer.text
                seen.append((answer.json()["error"]["type"], took))

    def painting() -> None:
        with Pipeline.open(bundle, threads=1, cloud=Cloud(up.url, up.token, seconds=SECONDS)) as edge:
            while not ended.is_set():
                began = time.monotonic()
                output = edge(**TANDEM)
                took = time.monotonic() - began
                np.testing.assert_array_equal(output.latents, alone.latents if output.degraded else tandem.state[0])
                seen.append((f"edge {output.degraded.partition(':')[0] or 'ok'}", took))

    with ThreadPoolExecutor(7) as threads:
        running = [threads.submit(work) for work in (*[asking] * 6, painting)]
        time.sleep(3)
        before = len(seen)
        up.kill(node)
        time.sleep(15)
        ended.set()
        for one in running:
            one.result()
    assert before >= 4
    outcomes = Counter(what for what, _ in seen)
    told = [line for line in client.get("/metrics").text.splitlines() if line.startswith("tandemrt_lost_total")]
    facts = {"killed": parts, "outcomes": outcomes, "before": before, "lost": told}
    print(json.dumps({**facts, "longest_s": max(took for _, took in seen)}))
    assert told
    assert max(took for _, took in seen) < SECONDS + 1
    assert outcomes["ok"] > before
    up.wait_until_ready()
    for _ in range(4):
        assert client.post("/v1/handoff", json={**JOB, "until": 5}).status_code == 200


def test_a_part_that_many_wait_for_gets_replicas(up: Cluster, client: httpx.Client, bundle: Path) -> None:
    fast = {"target_ongoing_requests": 1, "upscale_delay_s": 0.5, "look_back_period_s": 2}
    scaled = [one for one in DEPLOYMENTS if one["name"] != "unet_small"]
    scaled.append({"name": "unet_small", "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, **fast}})
    up.deploy(config_of(bundle, scaled, branches="unet", limits={"running": 8, "waiting": 8, "seconds": SECONDS}))
    slow = {**JOB, "steps": {"unet_small": 150}, "until": 150}
    ended = threading.Event()

    def asking() -> None:
        while not ended.is_set():
            client.post("/v1/handoff", json=slow)

    with ThreadPoolExecutor(6) as threads:
        for _ in range(6):
            threads.submit(asking)
        try:
            ends = time.monotonic() + 60
            while (replicas := up.replicas()["unet_small"]) < 2 and time.monotonic() < ends:
                time.sleep(1)
        finally:
            ended.set()
    assert replicas >= 2
