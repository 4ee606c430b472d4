"""Pictures that are served say how they were made, as those of `tandemrt generate` do."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime import Pipeline
from tandemrt.runtime.cli.program import main

from .asking import decoded, events_of, pictures_of

STEPS = "unet:2,unet_free:3"


def painted(client: httpx.Client, **asked: Any) -> list[Any]:
    return pictures_of(client.post("/v1/images/generations", json={"prompt": "red", "steps": STEPS, **asked}))


def streamed(client: httpx.Client, **asked: Any) -> list[Any]:
    name, facts = events_of(client.get("/v1/images/stream", params={"prompt": "red", "steps": STEPS, **asked}))[-1]
    assert name == "picture"
    return [decoded(one) for one in facts["b64_json"]]


@pytest.mark.parametrize("paint", [painted, streamed])
def test_the_text_of_a_png_is_that_of_generate(
    paint: Any, bundle: Path, client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "red", "--steps", STEPS, "--seed", "7", "--threads", "1", "--output-dir", str(tmp_path)]
    assert main(["generate", str(bundle), *words]) == 0
    capsys.readouterr()
    with Image.open(next(tmp_path.glob("*.png"))) as file:
        file.load()
        wanted = file.text  # type: ignore[attr-defined]
    (served,) = paint(client, seed=7)
    assert list(served.text) == list(wanted)
    assert {**served.text, "request": ""} == {**wanted, "request": ""}


@pytest.mark.parametrize(
    "asked",
    [
        {"seed": 7, "n": 2, "size": "64x96"},
        {"negative_prompt": "blue", "guidance_scale": 2.5},  # the seed is drawn
        {"steps": {"unet": 3}, "seed": 1},
    ],
)
def test_its_request_paints_it_again(asked: dict[str, Any], client: httpx.Client, pipe: Pipeline) -> None:
    pictures = painted(client, **asked)
    for index, picture in enumerate(pictures):
        again = pipe(**json.loads(picture.text["request"]))
        assert (len(again.images), str(again.seeds[index])) == (len(pictures), picture.text["seed"])
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(again.images[index]))


def test_other_files_say_nothing(client: httpx.Client) -> None:
    prompt = "red circles"
    for form in ("jpeg", "webp"):
        asked = {"prompt": prompt, "steps": STEPS, "output_format": form}
        (one,) = client.post("/v1/images/generations", json=asked).json()["data"]
        assert prompt.encode() not in base64.b64decode(one["b64_json"])
        picture = decoded(one["b64_json"])
        assert picture.format == form.upper()
        assert not {"prompt", "comment", "exif"} & set(picture.info)
