"""A device on the command line: `generate` and `serve` with `--cloud`, and what its server tells of both places."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime import Cloud, Pipeline
from tandemrt.runtime.cli import main
from tandemrt.serve.batching import in_common
from tandemrt.serve.command import add_arguments, plan_facts, plan_from_arguments
from tandemrt.serve.limits import Limits
from tandemrt.serve.protocol import Asked
from tandemrt.serve.served import Served
from tandemrt.serve.work import work_of

from .asking import TOKEN, decoded, events_of, pictures_of, until
from .conftest import serving
from .edge import ALONE, HERE, port_of
from .faults import between

STEPS = "cloud:unet:2,unet_free:3"


@pytest.fixture(scope="module")
def cloud(pipe: Pipeline) -> Iterator[str]:
    with serving(pipe, token=TOKEN) as client:
        yield str(client.base_url)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


def generated(bundle: Path, out: Path, *arguments: str) -> int:
    fixed = ["--prompt", "red", "--seed", "7", "--threads", "1", "--target", "onnxruntime:cpu", "--steps", STEPS]
    return main(["generate", str(bundle), "--output-dir", str(out), *fixed, *arguments])


def painted(out: Path) -> tuple[Any, Mapping[str, str]]:
    """The pixels of the picture that is there, and what it says."""
    (path,) = out.glob("*.png")
    with Image.open(path) as image:
        return np.asarray(image), dict(image.text)  # type: ignore[attr-defined]


def pixels(pipe: Pipeline, job: Mapping[str, Any]) -> Any:
    return np.asarray(pipe(**job).images[0])


def test_generate_in_two_places(
    cloud: str, token_file: Path, bundle: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cloud", cloud, "--cloud-token-file", str(token_file)]
    assert generated(bundle, tmp_path / "out", *options, "--print-plan") == 0
    told = capsys.readouterr().out
    assert f"cloud {cloud}\nsteps: 2 of cloud:unet, 3 of unet_free; " in told and TOKEN not in told
    assert generated(bundle, tmp_path / "out", *options, "--json") == 0
    told = capsys.readouterr()
    assert "cloud: 2 steps in " in told.err
    (facts,) = json.loads(told.out)["images"]
    assert (facts["degraded"], facts["cloud"][0]["steps"], facts["cloud"][0]["tries"]) == ("", 2, 1)
    image, texts = painted(tmp_path / "out")
    np.testing.assert_array_equal(image, pixels(pipe, HERE))
    assert json.loads(texts["plan"])["steps"] == [["cloud:unet", 2], ["unet_free", 3]]
    assert "degraded" not in texts


def test_generate_where_the_cloud_does_not_help(
    cloud: str, bundle: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(bundle, tmp_path / "out", "--cloud", cloud) == 0
    told = capsys.readouterr().err
    assert "the cloud did not help, and its steps ran here: unauthorized: " in told
    assert "cloud: no help with 2 steps in " in told
    image, texts = painted(tmp_path / "out")
    np.testing.assert_array_equal(image, pixels(pipe, ALONE))
    assert texts["degraded"] == "unauthorized: it does not take the token"
    np.testing.assert_array_equal(image, pixels(pipe, json.loads(texts["request"])))


def test_generate_where_nobody_knows_of_a_denoiser(
    cloud: str, token_file: Path, bundle: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--steps", "cloud:unet_large:2,unet_free:3"]
    assert generated(bundle, tmp_path / "out", "--cloud", "http://127.0.0.1:9", *steps) == 0
    assert "its steps ran here: unreachable: " in capsys.readouterr().err
    image, texts = painted(tmp_path / "out")
    np.testing.assert_array_equal(image, pixels(pipe, ALONE))
    assert texts["degraded"].startswith("unreachable: ")

    options = ["--cloud", cloud, "--cloud-token-file", str(token_file)]
    assert generated(bundle, tmp_path / "again", *options, *steps) == 2
    assert "steps: unknown denoiser, got 'cloud:unet_large'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cloud-seconds", "3"], "--cloud-seconds: given without --cloud"),
        (["--cloud-token-file", "nowhere"], "--cloud-token-file: given without --cloud"),
        (["--cloud-half"], "--cloud-half: given without --cloud"),
        (["--cloud", "example.org"], "--cloud: no address, got 'example.org'"),
        (
            ["--cloud", "http://127.0.0.1", "--cloud-token-file", "nowhere"],
            "--cloud-token-file nowhere: cannot be read",
        ),
        (["--cloud", "http://127.0.0.1", "--cloud-seconds", "0"], "--cloud-seconds: not usable, got 0.0"),
        (["--cloud", "http://me@example.org"], "--cloud: an address with a user's name"),
        ([], "--steps: name a server's denoiser, got 'cloud:unet:2,unet_free:3'. Give --cloud URL."),
        (
            ["--cloud", "http://127.0.0.1", "--steps", "3"],
            "--cloud: given, but --steps name no denoiser of the server's",
        ),
    ],
)
def test_options_of_a_cloud_that_cannot_be_used(
    arguments: list[str], told: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(bundle, tmp_path / "out", *arguments) == 2
    assert told in capsys.readouterr().err


def test_serve_takes_the_options_of_a_cloud(token_file: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--cloud", "https://example.org", "--cloud-token-file", str(token_file), "--cloud-seconds", "5"]
    assert not plan_from_arguments(parser.parse_args(["bundle", *options])).cloud.half  # type: ignore[union-attr]
    options.append("--cloud-half")
    plan = plan_from_arguments(parser.parse_args(["bundle", *options]))
    assert plan.cloud is not None
    assert (plan.cloud.url, plan.cloud.seconds, plan.cloud.half) == ("https://example.org", 5, True)
    assert plan_facts(plan)["cloud"] == "https://example.org"
    assert TOKEN not in f"{plan_facts(plan)} {plan.cloud}"


def test_a_device_names_both_places_denoisers(device: httpx.Client) -> None:
    name = device.get("/v2").json()["model"]
    facts = device.get(f"/v2/models/{name}").json()
    own = ["unet", "unet_second", "unet_free", "unet_other"]
    assert facts["denoisers"] == [*own, *(f"cloud:{name}" for name in own)]
    assert list(facts["components"]) == own
    assert facts["limits"]["steps"] == 150


def test_a_device_tells_of_both_places(device: httpx.Client, pipe: Pipeline) -> None:
    asked = {"prompt": "red", "seed": "7", "steps": STEPS, "previews": "1"}
    told = events_of(device.get("/v1/images/stream", params=asked))
    assert [name for name, _ in told] == ["stage", "step", "step", "step", "stage", "picture"]
    assert [facts["stage"] for name, facts in told if name == "stage"] == ["cloud", "sampled"]
    assert [(facts["row"], facts["denoiser"]) for name, facts in told if name == "step"] == [
        (row, "unet_free") for row in (2, 3, 4)
    ]
    facts = told[-1][1]
    assert facts["steps"] == [["cloud:unet", 2], ["unet_free", 3]]
    (exchange,) = facts["cloud"]
    assert (exchange["steps"], exchange["tries"], facts["degraded"]) == (2, 1, "")
    assert facts["cloud_ms"] == pytest.approx(1e3 * exchange["seconds"], abs=0.01)
    assert facts["total_ms"] > facts["cloud_ms"] + facts["denoise_ms"]
    np.testing.assert_array_equal(np.asarray(decoded(facts["b64_json"][0])), pixels(pipe, HERE))


def test_a_picture_without_the_cloud_says_so(bundle: Path, pipe: Pipeline) -> None:
    with (
        Pipeline.open(bundle, threads=1, cloud=Cloud("http://127.0.0.1:9", seconds=5)) as edge,
        serving(edge) as served,
    ):
        told = served.post("/v1/images/generations", json={"prompt": "red", "seed": 7, "steps": STEPS})
        counted = served.get("/metrics").text
    degraded = told.json()["degraded"]
    assert degraded == "unreachable: it could not be reached, or broke off"  # and not where it was
    (picture,) = pictures_of(told)
    texts = picture.text
    np.testing.assert_array_equal(np.asarray(picture), pixels(pipe, json.loads(texts["request"])))
    assert texts["degraded"] == degraded
    assert json.loads(texts["plan"])["steps"] == [["unet_free", 5]]
    assert 'tandemrt_fallbacks_total{component="cloud"} 1.0' in counted


def test_the_log_tells_when_help_is_lost_and_when_it_is_back(
    bundle: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tandemrt.serve.served._ASKS_S", 0.05)
    with between(0) as proxy, Pipeline.open(bundle, threads=1, cloud=proxy.url) as edge, serving(edge) as device:

        def reason() -> str:
            asked = {"prompt": "a secret", "steps": STEPS}
            degraded: str = device.post("/v1/images/generations", json=asked).json()["degraded"]
            return degraded.partition(":")[0]

        until(lambda: caplog.messages)  # nobody has painted anything
        assert [reason() for _ in range(3)] == ["unreachable", "broken", "broken"]
        proxy.server_port = port_of(client)
        until(lambda: caplog.messages[1:])
        assert [reason() for _ in range(3)] == ["", "", ""]
        proxy.server_port = 0
        proxy.begin()
        assert [reason() for _ in range(2)] == ["unreachable", "broken"]
    lost = f"the cloud does not help, its steps run here: unreachable: {proxy.url}: cannot be reached"
    assert [message[: len(lost)] for message in caplog.messages] == [lost, "the cloud helps now", lost]
    assert "(" in caplog.messages[0] and {record.levelname for record in caplog.records} == {"WARNING"}


def test_requests_of_two_places_run_alone(bundle: Path, client: httpx.Client) -> None:
    """What the cloud takes of one, it may refuse of all of them together."""
    with Pipeline.open(bundle, threads=1, cloud=str(client.base_url)) as edge:
        served = Served.of(edge)
        there, here = (
            in_common(work_of(Asked(prompt="red", steps={name: 2, "unet_free": 3}), {}, served, Limits()))
            for name in ("cloud:unet", "unet")
        )
    assert there is None and here is not None


def test_whole_pictures_of_a_device(device: httpx.Client) -> None:
    answer = device.post("/v1/images/generations", json={"prompt": "red", "steps": STEPS})
    assert answer.json()["cloud"][0]["received_bytes"] > 1000
    assert ", cloud;dur=" in answer.headers["server-timing"]
    assert "cloud" not in device.post("/v1/images/generations", json={"prompt": "red", "steps": 1}).json()
    assert 'tandemrt_stage_seconds_count{stage="cloud"}' in device.get("/metrics").text
