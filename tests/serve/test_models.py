"""Whose models run a server's steps: those that the device knows under the name, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tandemrt.runtime import Cloud, Handover, Pipeline, PlanError, RequestError, cloud
from tandemrt.runtime.cloud import JSON
from tandemrt.runtime.handover import TEXT, models_of
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.messages import unpacked
from tandemrt.serve import served
from tandemrt.serve.protocol import TENSORS

from ..runtime.tiny_bundle import resign
from . import asking
from .conftest import serving
from .edge import ALONE, HERE, TANDEM, port_of
from .faults import between


def copied(bundle: Path, folder: Path, change: Callable[[Path], None], **edits: Any) -> Path:
    """A bundle with other files, listed as they are."""
    shutil.copytree(bundle, folder)
    change(folder)
    resign(folder, lambda manifest: msgspec.structs.replace(manifest, **{k: v(manifest) for k, v in edits.items()}))
    return folder


def other_weights(folder: Path) -> None:
    weights = folder / "unet" / "model.onnx.data"
    values = np.frombuffer(weights.read_bytes(), np.float32)
    weights.write_bytes((values * np.float32(1.01)).tobytes())


@pytest.fixture(scope="module")
def other(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose `unet` is another model."""
    return copied(bundle, tmp_path_factory.mktemp("other") / "bundle", other_weights)


@pytest.fixture(scope="module")
def small(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's bundle, without the large model."""

    def components(manifest: Manifest) -> Any:
        return {name: one for name, one in manifest.components.items() if name != "unet"}

    folder = tmp_path_factory.mktemp("small") / "bundle"
    return copied(bundle, folder, lambda folder: shutil.rmtree(folder / "unet"), components=components)


@pytest.fixture(scope="module")
def other_pipe(other: Path) -> Iterator[Pipeline]:
    with Pipeline.open(other, threads=1) as pipe:
        yield pipe


def test_a_hand_over_says_which_models_ran_its_steps(client: httpx.Client, pipe: Pipeline) -> None:
    manifest = pipe.bundle.manifest
    digests = models_of(manifest)
    assert list(digests) == [*manifest.names("denoiser"), TEXT]
    assert client.get("/v2/models/bundle").json()["models"] == digests
    assert len(set(digests.values())) == len(digests)
    for until, names in ((1, ["unet"]), (2, ["unet"]), (4, ["unet", "unet_free"])):
        answer = client.post("/v1/handoff", json={**HERE, "until": until})
        made = Handover.from_bytes(answer.content)
        assert made.models == {name: digests[name] for name in names}
        rest = pipe(**HERE, start=made, until=5).handover
        assert rest is not None
        assert rest.models == {name: digests[name] for name in ("unet", "unet_free")}


def test_another_model_of_the_name_is_refused(client: httpx.Client, pipe: Pipeline, other_pipe: Pipeline) -> None:
    served, known = (one.bundle.manifest.model_digest("unet") for one in (pipe, other_pipe))
    assert served != known
    assert pipe.bundle.manifest.model_digest("unet_free") == other_pipe.bundle.manifest.model_digest("unet_free")

    def answered(models: Any) -> httpx.Response:
        return client.post("/v1/handoff", json={**HERE, "until": 2, "models": models})

    refused = answered({"unet": known})
    told = f"models: unet: got '{known[:16]}', expected '{served[:16]}', which is served."
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, told)
    assert answered({"unet": served, TEXT: models_of(pipe.bundle.manifest)[TEXT]}).status_code == 200
    lacking = answered({"unet": served, "unet_of_mine": known})
    assert (lacking.status_code, "models: 'unet_of_mine': none is served, expected" in lacking.text) == (409, True)
    assert answered({"unet": 3}).status_code == 422

    made = Handover.from_bytes(answered(None).content)
    with pytest.raises(RequestError, match=rf"start: its 'unet' is another model, got '{served[:16]}', expected"):
        other_pipe(**HERE, start=made)


def test_a_model_that_is_known_is_the_one_that_runs(
    client: httpx.Client, bundle: Path, other: Path, pipe: Pipeline
) -> None:
    url = str(client.base_url)
    with Pipeline.open(bundle, threads=1, cloud=url) as edge:
        output = edge(**TANDEM)
    assert output.degraded == ""
    assert output.cloud[0].models == {"unet": pipe.bundle.manifest.model_digest("unet")}
    with Pipeline.open(other, threads=1, cloud=url) as edge:
        for _ in range(4):  # who refuses is there, and is asked again
            output = edge(**TANDEM)
            assert output.degraded.startswith("conflict: "), output.degraded
            assert "409: models: unet: got" in output.degraded
    np.testing.assert_array_equal(output.latents, pipe(**ALONE).latents)


def other_text_encoder(folder: Path, name: str = "text_encoder") -> None:
    path = folder / name / "model.onnx"
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(model, path)


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(f"{path.read_text('utf-8')}\n", "utf-8")


def other_name(folder: Path) -> None:
    """The text encoder's component is called otherwise, and it is another one."""
    (folder / "text_encoder").rename(folder / "text_encoder_one")
    other_text_encoder(folder, "text_encoder_one")

    def renamed(manifest: Manifest) -> Manifest:
        encoder = msgspec.structs.replace(manifest.components["text_encoder"], model="text_encoder_one/model.onnx")
        others = {name: one for name, one in manifest.components.items() if name != "text_encoder"}
        encoders = {"text_encoder_one": manifest.text.encoders["text_encoder"]}
        text = msgspec.structs.replace(manifest.text, encoders=encoders)
        return msgspec.structs.replace(manifest, components={"text_encoder_one": encoder, **others}, text=text)

    resign(folder, renamed)


@pytest.mark.parametrize("change", [other_text_encoder, other_tokenizer, other_name])
def test_another_text_encoder_is_told_of(
    change: Callable[[Path], None], client: httpx.Client, bundle: Path, tmp_path: Path, pipe: Pipeline
) -> None:
    """The same denoisers, but prompts mean something else there than here."""
    with Pipeline.open(copied(bundle, tmp_path / "bundle", change), threads=1, cloud=str(client.base_url)) as edge:
        output = edge(**TANDEM)
        assert output.degraded.startswith("conflict: "), output.degraded
        assert "409: models: text-encoders: got" in output.degraded
        np.testing.assert_array_equal(output.latents, edge(**ALONE).latents)
        # What is encoded here needs no text encoder there.
        embeds = edge.encode_prompt(**TANDEM)
        embedded = edge(**{**TANDEM, "prompt": None}, **embeds)
        assert embedded.degraded == ""
        np.testing.assert_array_equal(embedded.latents, pipe(**{**HERE, "prompt": None}, **embeds).latents)
        half = {name: values for name, values in embeds.items() if not name.startswith("negative")}
        assert edge(**{**TANDEM, "prompt": None}, **half).degraded.startswith("conflict: ")


@pytest.mark.parametrize("zero_there", [False, True])
def test_a_text_that_one_side_alone_encodes_is_compared(
    zero_there: bool, client: httpx.Client, bundle: Path, tmp_path: Path, pipe: Pipeline
) -> None:
    """Without a negative prompt one reads zeros, and the other an empty text: whichever of them is the server."""

    def zero(manifest: Manifest) -> Any:
        return msgspec.structs.replace(manifest.text, zero_negative=True)

    turned = copied(bundle, tmp_path / "bundle", lambda _: None, text=zero)
    with ExitStack() as opened:
        if zero_there:
            there = opened.enter_context(Pipeline.open(turned, threads=1))
            client = opened.enter_context(serving(there))
        here = bundle if zero_there else turned
        edge = opened.enter_context(Pipeline.open(here, threads=1, cloud=str(client.base_url)))
        embeds = edge.encode_prompt(**TANDEM)
        assert edge(**{**TANDEM, "prompt": None}, **embeds).degraded == ""
        half = {name: values for name, values in embeds.items() if not name.startswith("negative")}
        assert edge(**{**TANDEM, "prompt": None}, **half).degraded.startswith("conflict: ")
        assert edge(**{**TANDEM, "prompt": None}, **half, guidance_scale=1.0).degraded == ""


def test_a_model_that_the_device_lacks_is_the_one_that_was_there_when_it_asked(
    small: Path, client: httpx.Client, pipe: Pipeline, other_pipe: Pipeline
) -> None:
    with (
        serving(other_pipe) as other,
        between(port_of(client)) as proxy,
        Pipeline.open(small, threads=1, cloud=proxy.url) as edge,
    ):
        output = edge(**TANDEM)
        assert output.degraded == ""
        assert output.cloud[0].models == {"unet": pipe.bundle.manifest.model_digest("unet")}
        np.testing.assert_array_equal(output.latents, pipe(**HERE).latents)
        proxy.server_port = port_of(other)
        proxy.begin()
        output = edge(**TANDEM)
        assert output.degraded.startswith("conflict: "), output.degraded
        np.testing.assert_array_equal(output.latents, pipe(**ALONE).latents)


def test_an_answer_of_another_model_is_not_gone_on_with(
    client: httpx.Client, other_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that passes over what is asked for, or one behind a proxy."""
    manifest = other_pipe.bundle.manifest
    asked = Cloud._exchanged

    def without_models(self: Cloud, method: str, path: str, body: bytes, *more: Any) -> bytes:
        if method == "POST":
            _, message = unpacked("body", body, TENSORS, {"protocol": True, "request": True})
            facts = {name: value for name, value in json.loads(message["request"]).items() if name != "models"}
            return client.post(path, content=json.dumps(facts), headers={"content-type": JSON}).content
        return asked(self, method, path, body, *more)

    monkeypatch.setattr(Cloud, "_exchanged", without_models)
    with Pipeline.open(other_pipe.bundle.path, threads=1, cloud=str(client.base_url)) as edge:
        output = edge(**TANDEM)
    assert output.degraded.startswith("conflict: ")
    assert f"expected {{'unet': '{manifest.model_digest('unet')}'}}" in output.degraded


def test_a_model_that_is_another_there_is_not_offered(other_pipe: Pipeline, client: httpx.Client) -> None:
    with (
        Pipeline.open(other_pipe.bundle.path, threads=1, cloud=str(client.base_url)) as edge,
        serving(edge) as device,
    ):
        offered = device.get("/v2/models/bundle").json()["denoisers"]
    same = ["unet_second", "unet_free", "unet_other"]
    assert offered == ["unet", *same, *(f"cloud:{name}" for name in same)]


def test_a_server_that_comes_later_is_asked_again(
    small: Path, client: httpx.Client, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "BROKEN_S", 0.0)
    with between(0) as proxy, Pipeline.open(small, threads=1, cloud=proxy.url) as edge:
        alone = edge(**TANDEM)
        assert alone.degraded.startswith("unreachable: "), alone.degraded
        np.testing.assert_array_equal(alone.latents, pipe(**ALONE).latents)
        for steps in ({"cloud:unet": -1, "unet_free": 3}, [("cloud:unet",)], {"cloud:unet": 0}):
            with pytest.raises(PlanError, match="steps"):
                edge(**{**TANDEM, "steps": steps})
        proxy.server_port = port_of(client)
        together = edge(**TANDEM)
    assert together.degraded == ""
    np.testing.assert_array_equal(together.latents, pipe(**HERE).latents)


def test_a_server_learns_later_what_its_cloud_serves(
    small: Path, client: httpx.Client, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it looks, that is no failure, and it finds a cloud which is left alone since requests failed."""
    monkeypatch.setattr(served, "_ASKS_S", 0.05)
    with (
        between(0) as proxy,
        Pipeline.open(small, threads=1, cloud=proxy.url) as edge,
        serving(edge) as device,
    ):
        asking.until(lambda: proxy.connections > cloud.BREAKING + 2)

        def painted(steps: Any) -> httpx.Response:
            return device.post("/v1/images/generations", json={**TANDEM, "steps": steps, "strict_prompts": True})

        def denoisers() -> Any:
            return device.get("/v2/models/bundle").json()["denoisers"]

        assert denoisers() == ["unet_second", "unet_free", "unet_other"]
        alone = painted(TANDEM["steps"])
        assert alone.status_code == 200, alone.text
        assert alone.json()["degraded"].startswith("unreachable: ")
        assert asking.pictures_of(alone)[0].tobytes() == pipe(**ALONE).images[0].tobytes()
        assert painted(TANDEM["steps"]).json()["degraded"].startswith("broken: ")
        assert painted({"unet_nowhere": 2}).status_code == 422
        assert painted({"cloud:unet": 200}).status_code == 422
        proxy.server_port = port_of(client)
        asking.until(lambda: "cloud:unet" in denoisers())
        together = painted(TANDEM["steps"])
        assert painted({"cloud:unet_nowhere": 2}).status_code == 422
    assert together.json()["degraded"] == ""
    assert asking.pictures_of(together)[0].tobytes() == pipe(**HERE).images[0].tobytes()
