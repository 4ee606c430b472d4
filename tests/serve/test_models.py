"""Whose models run a server's steps: those that the device knows under the name, or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from tandemrt.runtime import Handover, Pipeline, RequestError
from tandemrt.runtime.manifest import Manifest

from ..runtime.tiny_bundle import resign

JOB: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}
TANDEM: dict[str, Any] = {**JOB, "steps": {"cloud:unet": 2, "unet_free": 3}}
ALONE: dict[str, Any] = {**JOB, "steps": {"unet_free": 5}}


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
    digests = {name: manifest.model_digest(name) for name in manifest.names("denoiser")}
    assert client.get("/v2/models/bundle").json()["models"] == digests
    assert len(set(digests.values())) == len(digests)
    for until, names in ((1, ["unet"]), (2, ["unet"]), (4, ["unet", "unet_free"])):
        answer = client.post("/v1/handoff", json={**JOB, "until": until})
        made = Handover.from_bytes(answer.content)
        assert made.models == {name: digests[name] for name in names}
        rest = pipe(**JOB, start=made, until=5).handover
        assert rest is not None
        assert rest.models == {name: digests[name] for name in ("unet", "unet_free")}


def test_another_model_of_the_name_is_refused(client: httpx.Client, pipe: Pipeline, other_pipe: Pipeline) -> None:
    served, known = (one.bundle.manifest.model_digest("unet") for one in (pipe, other_pipe))
    assert served != known
    assert pipe.bundle.manifest.model_digest("unet_free") == other_pipe.bundle.manifest.model_digest("unet_free")

    def answered(models: Any) -> httpx.Response:
        return client.post("/v1/handoff", json={**JOB, "until": 2, "models": models})

    refused = answered({"unet": known})
    told = f"models: unet: got '{known[:16]}', expected '{served[:16]}', which is served."
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, told)
    assert answered({"unet": served, "unet_of_mine": known}).status_code == 200
    assert answered({"unet": 3}).status_code == 422

    made = Handover.from_bytes(answered(None).content)
    with pytest.raises(RequestError, match=rf"start: its 'unet' is another model, got '{served[:16]}', expected"):
        other_pipe(**JOB, start=made)
