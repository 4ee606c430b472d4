"""Whatever goes wrong: the picture of both places, all of it here and the reason why, or an error by name; in time."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tandemrt.runtime import Cloud, Output, Pipeline, StepEvent, Stream
from tandemrt.runtime.cloud import MESSAGE
from tandemrt.runtime.errors import ExecutionError
from tandemrt.runtime.messages import packed
from tandemrt.runtime.safetensors_files import described
from tandemrt.runtime.stream import Stage
from tandemrt.serve.limits import Limits

from ..runtime.tiny_bundle import resign
from ..runtime.tiny_families import write_tiny_control
from .conftest import serving
from .faults import Faults, between
from .test_edge import ALONE, HERE, TANDEM, TOKEN, painted, port_of

REASONS = {"deadline", "unreachable", "malformed", "refused", "failed", "busy", "unready", "unauthorized", "conflict"}
SEED, CASES, SECONDS = 8, 16, 0.4
ALL = 1_000_000
NO_SPACE = errno.ENOSPC, os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module")
def server(pipe: Pipeline) -> Iterator[httpx.Client]:
    with serving(pipe, Limits(seconds=5)) as client:
        yield client


@pytest.fixture(scope="module")
def allowed(pipe: Pipeline) -> tuple[Any, Any]:
    """The latents of both places, and of the device alone."""
    return pipe(**HERE).latents, pipe(**ALONE).latents


def require_allowed(output: Output, allowed: tuple[Any, Any]) -> str:
    """Check that a picture is the one that it says it is; the reason why it is not that of both places."""
    reason = output.degraded.partition(":")[0]
    assert reason in {"", *REASONS}, output.degraded
    np.testing.assert_array_equal(output.latents, allowed[bool(reason)])
    return reason


def rows(client: httpx.Client) -> float:
    """How many rows the server's large denoiser has run."""
    found = re.search(r'^tandemrt_rows_total\{denoiser="unet"\} (\S+)$', client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("number", range(CASES))
def test_faults_together(number: int, bundle: Path, server: httpx.Client, allowed: tuple[Any, Any]) -> None:
    random = Random(f"{SEED}/{number}")
    with between(port_of(server), some_faults(random), some_faults(random)) as proxy:
        require_allowed(painted(bundle, proxy, seconds=SECONDS), allowed)


def some_faults(random: Random) -> Faults:
    """None, one or two of them, on the first connections or on all."""
    drawn = {
        "delay_s": random.uniform(0.0, 0.5),
        "bytes_per_s": random.choice((500, 5_000, 50_000)),
        "cut_after": random.randrange(1500),
        "corrupted": random.randrange(1500),
        "doubled": random.randrange(1500),
        "swallowed": True,
        "replayed": True,
    }
    chosen = random.sample(sorted(drawn), random.choice((0, 1, 1, 2)))
    return Faults(connections=random.choice((1, 1, 2, ALL)), **{name: drawn[name] for name in chosen})


def test_a_prompt_that_was_damaged_paints_no_other_picture(
    bundle: Path, server: httpx.Client, allowed: tuple[Any, Any]
) -> None:
    with between(port_of(server)) as proxy:
        assert require_allowed(painted(bundle, proxy), allowed) == ""
    place = proxy.sent.index(b"red")
    with between(port_of(server), up=Faults(corrupted=place)) as proxy:
        assert require_allowed(painted(bundle, proxy), allowed) == "refused"
    assert b"2ed" in proxy.sent


@pytest.mark.parametrize("what", ["comes twice", "is asked for again"])
def test_a_request_is_painted_once(what: str, bundle: Path, server: httpx.Client, allowed: tuple[Any, Any]) -> None:
    twice = what == "comes twice"
    up, down = (Faults(replayed=True), Faults()) if twice else (Faults(), Faults(cut_after=300, connections=1))
    before = rows(server)
    with between(port_of(server), up, down) as proxy:
        output = painted(bundle, proxy)
    assert require_allowed(output, allowed) == ""
    assert output.cloud[0].tries == (1 if twice else 2)
    assert rows(server) - before == 2


class Slow:
    """A pipeline that takes a while for each row."""

    def __init__(self, pipe: Pipeline, row_s: float) -> None:
        self._pipe, self._row_s = pipe, row_s
        self.rows = 0
        self.cancelled = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def stream_planned(self, *asked: Any) -> SlowStream:
        return SlowStream(self, self._pipe.stream_planned(*asked), self._row_s)


class SlowStream:
    """Its rows."""

    def __init__(self, owner: Slow, stream: Stream, row_s: float) -> None:
        self._owner, self._stream, self._row_s = owner, stream, row_s
        self.result = stream.result

    def with_stages(self) -> Iterator[StepEvent | Stage]:
        for event in self._stream.with_stages():
            if isinstance(event, StepEvent):
                time.sleep(self._row_s)
                self._owner.rows += 1
            yield event

    def cancel(self) -> None:
        self._owner.cancelled.set()
        self._stream.cancel()


def test_a_slow_cloud_is_not_waited_for_and_stops(bundle: Path, pipe: Pipeline) -> None:
    slow = Slow(pipe, 0.1)
    job = {**TANDEM, "steps": {"cloud:unet": 20, "unet_free": 3}}
    with serving(slow) as client:
        output = painted(bundle, str(client.base_url), job, seconds=0.3)
        assert slow.cancelled.wait(1)
        np.testing.assert_array_equal(output.latents, pipe(**{**ALONE, "steps": {"unet_free": 23}}).latents)
        assert output.degraded.startswith("deadline: ")
        assert client.post("/v1/handoff", json={**HERE, "until": 1}, timeout=2).status_code == 200
    assert slow.rows < 20


def test_a_token_that_expires(bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any]) -> None:
    with (
        serving(pipe, token=TOKEN) as first,
        serving(pipe, token=f"{TOKEN}-of-today") as second,
        between(port_of(first)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, TOKEN, seconds=2)) as edge,
    ):
        assert require_allowed(edge(**TANDEM), allowed) == ""
        proxy.server_port = port_of(second)
        proxy.begin()
        assert require_allowed(edge(**TANDEM), allowed) == "unauthorized"
        assert proxy.sent.count(b"POST /v1/handoff") == 1  # asking again would not help


def test_clocks_that_go_wrong(
    bundle: Path, server: httpx.Client, allowed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, days = time.time, itertools.cycle((-3, 400, 0, -10_000))
    monkeypatch.setattr(time, "time", lambda: now() + 86_400 * next(days))
    with between(port_of(server), down=Faults(cut_after=300, connections=1)) as proxy:
        output = painted(bundle, proxy)
    assert require_allowed(output, allowed) == ""
    assert output.cloud[0].tries == 2
    with between(port_of(server), up=Faults(swallowed=True)) as proxy:
        output = painted(bundle, proxy, seconds=0.3)
    assert require_allowed(output, allowed) == "deadline"


def test_disks_that_are_full(
    bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Any] = []
    opened, made = io.open, os.open

    def no_file(path: Any, mode: str = "r", *rest: Any, **others: Any) -> Any:
        if set(mode) & set("wax+") and not isinstance(path, int):
            refused.append(path)
            raise OSError(*NO_SPACE, str(path))
        return opened(path, mode, *rest, **others)

    def no_descriptor(path: Any, flags: int, *rest: Any, **others: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refused.append(path)
            raise OSError(*NO_SPACE, str(path))
        return made(path, flags, *rest, **others)

    def no_folder(path: Any, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise OSError(*NO_SPACE, str(path))

    for module, name, stand_in in (
        (io, "open", no_file),
        (builtins, "open", no_file),
        (os, "open", no_descriptor),
        (os, "mkdir", no_folder),
    ):
        monkeypatch.setattr(module, name, stand_in)
    with pytest.raises(OSError, match="No space left"):
        (bundle / "x").write_text("x")
    with serving(pipe) as client:
        assert require_allowed(painted(bundle, str(client.base_url)), allowed) == ""
        answer = client.post("/v1/images/generations", json={"prompt": "red", "steps": 2})
        assert answer.status_code == 200, answer.text


class Full:
    """A pipeline that cannot write, once it is told so."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe, self.full = pipe, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def stream_planned(self, *asked: Any) -> Stream:
        if self.full:
            raise OSError(*NO_SPACE, "/a/place/of/the/server")
        return self._pipe.stream_planned(*asked)


def test_what_is_not_the_callers_fault_is_told_by_a_number(
    bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    full = Full(pipe)
    with serving(full) as client:
        full.full = True
        output = painted(bundle, str(client.base_url))
        full.full = False
        assert require_allowed(painted(bundle, str(client.base_url)), allowed) == ""
    assert require_allowed(output, allowed) == "failed"
    told = re.search(
        r"answered 500: The request failed\. The server's log has the reason, under (\w{32})\.", output.degraded
    )
    assert told, output.degraded
    assert "/a/place/of/the/server" not in output.degraded
    assert any(told[1] in line and "/a/place/of/the/server" in line for line in caplog.messages)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, but that its `unet_free` says NaN."""
    folder = tmp_path_factory.mktemp("poisoned") / "bundle"
    write_tiny_control(folder)
    path = folder / "unet_free" / "model.onnx"
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), weight.name))
    onnx.save(model, path)
    resign(folder)
    return folder


def test_a_server_whose_model_says_nan(poisoned: Path, pipe: Pipeline) -> None:
    job = {**TANDEM, "steps": {"cloud:unet_free": 2, "unet": 3}}
    with Pipeline.open(poisoned, threads=1) as served, serving(served) as client:
        output = painted(poisoned, str(client.base_url), job)
        answer = client.post("/v1/handoff", json={**HERE, "steps": {"unet_free": 2}, "until": 1})
        assert client.post("/v1/handoff", json={**HERE, "until": 1}).status_code == 200
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["type"] == "not_finite"
    assert "unet_free" in error["message"]
    assert str(poisoned.parent) not in answer.text
    assert output.degraded.startswith(f"failed: {client.base_url!s}".rstrip("/"))
    assert "unet_free" in output.degraded
    np.testing.assert_array_equal(output.latents, pipe(**{**TANDEM, "steps": {"unet": 5}}).latents)


def test_a_device_whose_model_says_nan(poisoned: Path, server: httpx.Client) -> None:
    began = time.monotonic()
    with (
        Pipeline.open(poisoned, threads=1, cloud=Cloud(str(server.base_url), seconds=1)) as edge,
        pytest.raises(ExecutionError, match=r"unet_free.*NaN or Inf"),
    ):
        edge(**TANDEM)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("values", [np.nan, np.inf])
def test_a_server_that_answers_nan(values: float, bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any]) -> None:
    handover = pipe(**HERE, until=2).handover
    assert handover is not None
    facts = {key: text for key, text in described("", handover.to_bytes()).metadata.items() if key != "sha256"}
    handover.state.flat[5] = values
    with answering(lambda _: packed({"state": handover.state}, facts)) as port:
        output = painted(bundle, f"http://127.0.0.1:{port}")
    assert require_allowed(output, allowed) == "malformed"
    assert "NaN or Inf" in output.degraded


def test_a_server_that_answers_with_other_pictures(bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any]) -> None:
    handover = pipe(**HERE, until=2, height=96).handover
    assert handover is not None
    with answering(lambda asked: replace(handover, request=sha256(asked).hexdigest()).to_bytes()) as port:
        output = painted(bundle, f"http://127.0.0.1:{port}")
    assert require_allowed(output, allowed) == "malformed"
    assert output.cloud[0].received_bytes == 0
    assert "answered a state of shape (2, 1, 4, 12, 8) for one of (2, 1, 4, 8, 8)" in output.degraded


def test_an_answer_to_another_request_is_not_taken(bundle: Path, pipe: Pipeline, allowed: tuple[Any, Any]) -> None:
    """As of a proxy that mixes two users up, who want the same plan from the same seed."""
    handover = pipe(**{**HERE, "prompt": "blue"}, until=2).handover
    assert handover is not None
    for request in ("", sha256(b"another").hexdigest()):
        with answering(lambda _, told=request: replace(handover, request=told).to_bytes()) as port:  # type: ignore[misc]
            output = painted(bundle, f"http://127.0.0.1:{port}")
        assert require_allowed(output, allowed) == "malformed"
        assert "answered for another request" in output.degraded


@contextmanager
def answering(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """A server that says nothing of itself, and gives an answer to whatever is posted; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = answer(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("Content-Type", MESSAGE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
