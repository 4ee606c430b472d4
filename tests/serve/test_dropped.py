"""Prompts that are too long: what was cut is told, or they are refused where that is asked for; in two places too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandemrt.runtime import Cloud, Pipeline, RequestError

from .asking import events_of
from .conftest import serving

LONG = "red " * 30 + "blue"
STEPS = {"unet": 1, "unet_free": 1}
THERE: Any = [{"cloud:unet": 2}, {"cloud:unet": 1, "unet_free": 1}]


def test_what_was_cut_is_told(client: httpx.Client, pipe: Pipeline) -> None:
    (cut,) = pipe(LONG, steps=STEPS, seed=7).dropped_text
    asked = {"steps": STEPS, "seed": 7}
    told = client.post("/v1/images/generations", json={**asked, "prompt": LONG}).json()["dropped"]
    wanted = {"prompt": LONG, "text": cut.text, "tokens": cut.tokens, "encoders": list(cut.encoders)}
    assert told == [wanted]
    assert cut.text.endswith("blue")
    assert client.post("/v1/images/generations", json={**asked, "prompt": "red"}).json()["dropped"] == []
    name, facts = events_of(client.get("/v1/images/stream", params={"prompt": LONG, "steps": "unet:1"}))[-1]
    assert (name, facts["dropped"]) == ("picture", [wanted])
    headers = [client.post("/v1/handoff", json={**asked, "prompt": prompt, "until": 1}).headers for prompt in
               (LONG, "red")]  # fmt: skip
    assert [one.get("dropped-tokens") for one in headers] == [str(cut.tokens), None]


def test_it_is_refused_where_that_is_asked_for(client: httpx.Client) -> None:
    asked = {"steps": STEPS, "strict_prompts": True, "prompt": LONG}
    answers = [
        client.post("/v1/images/generations", json=asked),
        client.post("/v1/handoff", json={**asked, "until": 1}),
        client.get("/v1/images/stream", params={"prompt": LONG, "steps": "unet:1", "strict_prompts": "true"}),
    ]
    for answer in answers:
        assert (answer.status_code, "too long" in answer.text) == (422, True), answer.text


@pytest.fixture(scope="module")
def edge(bundle: Path, client: httpx.Client) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1, cloud=str(client.base_url)) as opened:
        yield opened


@pytest.mark.parametrize("steps", THERE)
def test_a_device_tells_it_whoever_runs_the_steps(steps: Any, edge: Pipeline, pipe: Pipeline) -> None:
    asked: dict[str, Any] = {"negative_prompt": f"{LONG} red", "guidance_scale": 2.0, "seed": 7}
    wanted = pipe(LONG, **asked, steps={"unet": 2}).dropped_text
    output = edge(LONG, **asked, steps=steps)
    assert (output.degraded, output.dropped_text) == ("", wanted)
    assert len(wanted) == 2
    assert edge("red", steps=steps, seed=7).dropped_text == ()


@pytest.mark.parametrize("steps", THERE)
def test_a_device_refuses_it_before_the_server_is_asked(steps: Any, bundle: Path) -> None:
    nowhere = Cloud("http://127.0.0.1:9", seconds=5)
    with (
        Pipeline.open(bundle, threads=1, cloud=nowhere) as alone,
        pytest.raises(RequestError, match="prompt: too long"),
    ):
        alone.stream(LONG, steps=steps, seed=7, strict_prompts=True)


def test_a_server_that_is_a_device_tells_it(edge: Pipeline) -> None:
    with serving(edge) as device:
        asked = {"prompt": LONG, "steps": {"cloud:unet": 2}, "seed": 7}
        answer = device.post("/v1/images/generations", json=asked).json()
        assert [one["prompt"] for one in answer["dropped"]] == [LONG]
        refused = device.post("/v1/images/generations", json={**asked, "strict_prompts": True})
        assert (refused.status_code, "too long" in refused.text) == (422, True)
