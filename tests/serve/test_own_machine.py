"""A server without a token is for this machine: not for what another site's page has a browser here ask."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import pytest

from tandemrt.runtime import Pipeline

from .asking import TOKEN, connection, counted, measured, status_of
from .conftest import serving

STREAM = "/v1/images/stream?prompt=red&steps=1"


@pytest.mark.parametrize(
    ("status", "path", "headers"),
    [
        (200, STREAM, {}),
        (200, "/v2", {"host": "localhost:8080"}),
        (200, "/v2", {"host": "127.1.2.3"}),
        (200, "/v2", {"host": "[::1]:8080"}),
        (200, "/v2", {"sec-fetch-site": "same-origin"}),
        (200, "/v2", {"sec-fetch-site": "none"}),
        (200, "/", {"sec-fetch-site": "cross-site"}),  # a link to it
        (403, STREAM, {"sec-fetch-site": "cross-site"}),
        (403, STREAM, {"sec-fetch-site": "same-site"}),  # of another port
        (403, STREAM, {"host": "rebound.example.org"}),
        (403, "/", {"host": "rebound.example.org:8080"}),
        (403, "/v2", {"host": "127.0.0.1.example.org"}),
        (403, "/v2", {"host": "localhost.example.org"}),
        (403, "/v2", {"host": "192.0.2.1"}),
        (403, "/v2", {"host": "[::1"}),
    ],
)
def test_who_may_ask_without_a_token(status: int, path: str, headers: Mapping[str, str], client: httpx.Client) -> None:
    calls = measured(client, "tandemrt_call_requests_count")
    answer = client.get(path, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["type"] == "foreign"
    painted = measured(client, "tandemrt_call_requests_count") - calls
    assert painted == (status == 200 and path == STREAM)


def test_a_refusal_is_counted(client: httpx.Client) -> None:
    before = counted(client, "/v1/images/stream", "foreign")
    client.get(STREAM, headers={"sec-fetch-site": "cross-site"})
    assert counted(client, "/v1/images/stream", "foreign") == before + 1


def test_who_brings_the_token_may_ask_by_any_name(pipe: Pipeline) -> None:
    with serving(pipe, token=TOKEN) as client:
        headers = {"host": "gpu.example.org", "sec-fetch-site": "cross-site", "authorization": f"Bearer {TOKEN}"}
        assert client.get("/v2", headers=headers).status_code == 200


def test_the_page_stands_in_no_other_page(client: httpx.Client) -> None:
    assert "frame-ancestors 'none'" in client.get("/").headers["content-security-policy"]


def test_nothing_is_a_web_socket(client: httpx.Client) -> None:
    head = "GET /v2/health/live HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"
    assert status_of(connection(client, f"{head}\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==")) == 200
