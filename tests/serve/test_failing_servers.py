"""Servers that are slow, whose disk is full, or whose model says NaN: a reason by name, an error by number, in time."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tandemrt.runtime import Cloud, Pipeline, StepEvent, Stream
from tandemrt.runtime.errors import ExecutionError
from tandemrt.runtime.stream import Stage

from ..runtime.tiny_bundle import resign
from ..runtime.tiny_families import write_tiny_control
from .conftest import serving
from .edge import ALONE, HERE, TANDEM, painted, require_allowed

NO_SPACE = errno.ENOSPC, os.strerror(errno.ENOSPC)


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
        open(bundle / "x", "w")  # noqa: PTH123, SIM115 (Python 3.10's pathlib keeps the one it was imported with)
    assert refused == [bundle / "x"]
    with serving(pipe) as client:
        assert require_allowed(painted(bundle, str(client.base_url)), allowed) == ""
        answer = client.post("/v1/images/generations", json={"prompt": "red", "steps": 2})
        assert answer.status_code == 200, answer.text
    assert refused == [bundle / "x"]


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
        Pipeline.open(poisoned, threads=1, cloud=Cloud(str(server.base_url), seconds=10)) as edge,
        pytest.raises(ExecutionError, match=r"unet_free.*NaN or Inf"),
    ):
        edge(**TANDEM)
    assert time.monotonic() - began < 11
