"""Answers that are none of ours, or not to what was asked: the device takes none, and paints all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Pipeline
from tandemrt.runtime.cloud import MESSAGE
from tandemrt.runtime.messages import packed
from tandemrt.runtime.safetensors_files import described

from .edge import HERE, painted, require_allowed


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
