"""The page at `/`, in a browser: by keyboard alone, in two places, and when something goes wrong."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime import Cloud, Pipeline
from tandemrt.runtime.stream import Stream
from tandemrt.serve.limits import Limits

from .asking import TOKEN
from .browsing import Open, described, expect, painted
from .conftest import serving
from .faults import Faults, between

ORDER = ("prompt", "negative_prompt", "first", "steps", "second", "rest", "split", "guidance_scale", "seed", "previews",
         "paint")  # fmt: skip


def set_steps(tab: Any, first: str, steps: int, second: str, rest: int) -> None:
    tab.get_by_label("First on").select_option(value=first)
    tab.get_by_label("Then on").select_option(value=second)
    tab.get_by_label("Steps of the first").fill(str(steps))
    tab.get_by_label("Steps of the second").fill(str(rest))


def downloaded(tab: Any, name: str) -> tuple[str, bytes]:
    with tab.expect_download() as download:
        tab.get_by_role("link", name=name).click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def row_heads(tab: Any) -> list[str]:
    return [text.strip() for text in tab.get_by_role("rowheader").all_text_contents()]


def told(tab: Any) -> list[str]:
    said: list[str] = tab.evaluate("window.told")
    return said


def pixels(pipe: Pipeline, steps: Sequence[tuple[str, int]], prompt: str = "red") -> Any:
    return np.asarray(pipe(prompt, steps=steps, seed=7).images[0])


def test_a_picture_by_keyboard_alone(opened: Open, client: httpx.Client, pipe: Pipeline) -> None:
    tab = described(opened(client))
    typed = {"prompt": "red", "steps": "30", "second": "unet_f", "rest": "10", "seed": "7", "previews": "s"}
    order = []
    for _ in ORDER:
        tab.keyboard.press("Tab")
        order.append(tab.evaluate("document.activeElement.id"))
        if order[-1] in ("prompt", "steps", "rest"):
            tab.keyboard.press("Control+A")
        if order[-1] in typed:
            tab.keyboard.type(typed[order[-1]])
        if order[-1] == "split":
            tab.keyboard.press("ArrowLeft")
            tab.keyboard.press("ArrowLeft")
    assert tuple(order) == ORDER
    split = tab.get_by_role("slider", name="Where the second takes over")
    expect(split).to_have_attribute("aria-valuetext", "28 steps here on unet, then 12 steps here on unet_free")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("status")).to_contain_text("Painted in ")
    expect(tab.get_by_role("img", name="red, seed 7")).to_be_visible()
    name, file = downloaded(tab, "Download picture")
    assert name == "seed7.png"
    wanted = pixels(pipe, [("unet", 28), ("unet_free", 12)])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), wanted)
    assert any("picture: Preview after step " in said for said in told(tab))
    aloud = [said for said in told(tab) if said.startswith("live: Step")]
    assert aloud == [f"live: Step {step} of 40, here on {'unet' if step < 29 else 'unet_free'}" for step in
                     (10, 20, 30, 40)]  # fmt: skip
    assert row_heads(tab) == ["Here", "text", "unet", "unet_free", "decoding", "loading, previews", "All"]
    assert json.loads(downloaded(tab, "Download data")[1])["steps"] == [["unet", 28], ["unet_free", 12]]


def test_both_places_are_shown(opened: Open, device: httpx.Client, pipe: Pipeline) -> None:
    tab = described(opened(device))
    assert tab.get_by_label("First on").input_value() == "cloud:unet"
    expect(tab.get_by_label("First on").locator(":checked")).to_have_text("unet, in the cloud")
    set_steps(tab, "cloud:unet", 4, "unet_free", 8)
    tab.get_by_label("Prompt", exact=True).fill("red")
    tab.get_by_label("Seed").fill("7")
    painted(tab)
    assert "live: Steps 1 to 4 of 12 run in the cloud, on unet" in told(tab)
    assert any("picture: Preview after step " in said for said in told(tab))
    heads = row_heads(tab)
    assert heads[0] == "In the cloud" and heads[1].startswith("unet1 try, ") and heads[1].endswith(" kB down")
    assert heads[2:] == ["Here", "text", "unet_free", "decoding", "loading, previews", "All"]
    expect(tab.get_by_role("row", name="In the cloud")).to_contain_text("4")
    expect(tab.locator("#degraded")).to_be_hidden()
    facts = json.loads(downloaded(tab, "Download data")[1])
    assert (facts["cloud"][0]["steps"], facts["degraded"], facts["seed"]) == (4, "", 7)
    image = np.asarray(Image.open(io.BytesIO(downloaded(tab, "Download picture")[1])))
    np.testing.assert_array_equal(image, pixels(pipe, [("unet", 4), ("unet_free", 8)]))


def test_a_cloud_that_does_not_help_is_told(opened: Open, bundle: Path, client: httpx.Client) -> None:
    with (
        between(client.base_url.port or 0, down=Faults(swallowed=True)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=0.3)) as edge,
        serving(edge) as served,
    ):
        proxy.begin()
        tab = described(opened(served))
        set_steps(tab, "cloud:unet", 4, "unet_free", 8)
        painted(tab)
        words = "The cloud did not help: its steps ran here. deadline: it did not answer in time"
        expect(tab.get_by_role("alert").filter(has_text=words)).to_be_visible()
        assert "live: Steps 1 to 4 of 12 run in the cloud, on unet" in told(tab)
        assert row_heads(tab)[1].startswith("no help1 try, ") and row_heads(tab)[4] == "unet_free"
        assert json.loads(downloaded(tab, "Download data")[1])["steps"] == [["unet_free", 12]]


def test_a_token_is_asked_for_and_kept_in_the_tab(opened: Open, pipe: Pipeline) -> None:
    with serving(pipe, token=TOKEN) as client:
        tab = opened(client)
        addresses: list[str] = []
        tab.on("request", lambda request: addresses.append(request.url))
        field = tab.get_by_label("Token")
        expect(tab.get_by_text("This server wants a token.")).to_be_visible()
        field.fill(f"{TOKEN}-wrong")
        field.press("Enter")
        expect(tab.get_by_text("The server does not take this token.")).to_be_visible()
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        field.fill(TOKEN)
        field.press("Enter")
        painted(described(tab))
        assert len([address for address in addresses if "/v1/images/stream" in address]) == 1  # Enter painted nothing
        expect(field).not_to_have_attribute("aria-invalid", "true")
        assert addresses and not any(TOKEN in address for address in addresses)
        assert tab.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        tab.reload()
        described(tab)


def test_stopping_ends_the_servers_work(opened: Open, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    next_event = Stream._next

    def slow(stream: Stream) -> Any:
        time.sleep(0.02)
        return next_event(stream)

    monkeypatch.setattr(Stream, "_next", slow)
    with serving(pipe, Limits(steps=1000, waiting=0)) as client:
        tab = described(opened(client))
        set_steps(tab, "unet", 900, "unet_free", 0)
        tab.get_by_label("Preview every").select_option("1")
        tab.get_by_role("button", name="Paint").click()
        expect(tab.locator("#state")).to_contain_text("of 900, here on unet")
        assert client.post("/v1/images/generations", json={"prompt": "red"}).status_code == 429
        stop = tab.get_by_role("button", name="Stop")
        stop.focus()
        tab.keyboard.press("Enter")
        expect(tab.get_by_role("status")).to_have_text("Stopped")
        expect(tab.get_by_role("button", name="Paint")).to_be_focused()
        expect(stop).to_be_hidden()
        began = time.monotonic()
        while client.post("/v1/images/generations", json={"prompt": "red", "steps": 1}).status_code == 429:
            assert time.monotonic() - began < 5  # all the rows take 18 s
        assert tab.locator("#run-problem").text_content() == ""


def test_a_limit_is_told_at_its_control(opened: Open, client: httpx.Client) -> None:
    tab = described(opened(client))
    prompt = tab.get_by_label("Prompt", exact=True)
    prompt.fill("x" * 20_000)
    prompt.press("Control+Enter")
    expect(tab.locator("#prompt-problem")).to_contain_text("expected at most 16384")
    expect(prompt).to_be_focused()
    expect(prompt).to_have_attribute("aria-invalid", "true")
    prompt.fill("red")
    for steps, words in ((0, "At least one step is needed."), (200, "The server takes at most 150 steps.")):
        set_steps(tab, "unet", steps, "unet_free", 0)
        tab.get_by_role("button", name="Paint").click()
        assert tab.get_by_label("Steps of the first").evaluate("one => one.validationMessage") == words
    set_steps(tab, "unet", 2, "unet_free", 0)
    painted(tab)
    assert tab.locator("#prompt-problem").text_content() == ""


def test_what_a_prompt_had_no_room_for_is_told(opened: Open, client: httpx.Client) -> None:
    tab = described(opened(client))
    prompt = tab.get_by_label("Prompt", exact=True)
    prompt.fill("red " * 30 + "blue")
    painted(tab)
    told = tab.get_by_role("alert").filter(has_text="this was not painted: red")
    expect(told).to_be_visible()
    assert told.text_content().startswith("Too long by ") and told.text_content().endswith("blue")
    prompt.fill("red")
    painted(tab)
    expect(tab.locator("#dropped")).to_be_hidden()


def test_more_runs_than_two_are_the_bundles_own(opened: Open, client: httpx.Client) -> None:
    facts = client.get("/v2/models/bundle").json()
    facts["defaults"]["steps"] = [["unet", 1], ["unet_free", 2], ["unet", 1]]
    tab = opened(client)
    tab.route("**/v2/models/*", lambda route: route.fulfill(json=facts))
    addresses: list[str] = []
    tab.on("request", lambda request: addresses.append(request.url))
    tab.reload()
    described(tab)
    expect(tab.get_by_label("First on").locator(":checked")).to_have_text(
        "as the bundle says: 1 unet, 2 unet_free, 1 unet"
    )
    expect(tab.get_by_label("Steps of the first")).to_be_disabled()
    painted(tab)
    assert "steps=" not in addresses[-1]
    tab.get_by_label("First on").select_option(value="unet_free")
    expect(tab.get_by_label("Steps of the first")).to_be_enabled()
    painted(tab)
    assert "steps=unet_free%3A1%2Cunet_free%3A2" in addresses[-1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"status": 429, "json": {"error": {"message": "As many requests wait as may. Try again in 3 s."}}},
         "As many requests wait as may. Try again in 3 s."),
        ({"status": 503, "json": {"error": {"message": "Not ready: it is shutting down."}}},
         "Not ready: it is shutting down."),
        ({"status": 502, "body": "<html>"}, "502 Bad Gateway"),
        ({"body": 'event: error\ndata: {"error": {"message": "The request failed."}}\n\n'}, "The request failed."),
        ({"body": 'event: stage\ndata: {"stage": "cloud"}\n\n'}, "The connection broke off before the first step."),
        (None, "The server cannot be reached. Check that it runs, then try again."),
    ],
    ids=["429", "503", "502", "error", "cut", "lost"],
)  # fmt: skip
def test_what_goes_wrong_is_told_at_the_button(opened: Open, client: httpx.Client, answer: Any, words: str) -> None:
    tab = described(opened(client))
    tab.route("**/v1/images/stream*", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    tab.get_by_role("button", name="Paint").click()
    expect(tab.locator("#run-problem")).to_contain_text(words)
    expect(tab.get_by_role("button", name="Stop")).to_be_hidden()
    tab.unroute("**/v1/images/stream*")
    painted(tab)
    assert tab.locator("#run-problem").text_content() == ""
