"""Plans in two places: the picture of one process, or all of it here; never another, and never late."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from tandemrt.runtime import CancelledError, Cloud, Pipeline, StepEvent, TandemError, cloud
from tandemrt.runtime.errors import ArgumentError, CloudError
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.stream import Stage

from ..runtime.tiny_bundle import resign
from ..runtime.tiny_families import write_tiny_editing
from .asking import TOKEN
from .conftest import serving
from .edge import ALONE, HERE, SECONDS, TANDEM, painted, port_of
from .faults import Faults, between


@pytest.mark.parametrize(
    "steps",
    [
        {"cloud:unet": 2, "unet_free": 3},
        {"cloud:unet": 4},
        [("unet_free", 1), ("cloud:unet", 2), ("unet_free", 2)],
        [("cloud:unet", 1), ("unet_free", 1), ("cloud:unet", 2)],
    ],
)
def test_two_places_are_one_process_bit_for_bit(steps: Any, bundle: Path, server: httpx.Client, pipe: Pipeline) -> None:
    pairs = list(steps.items()) if isinstance(steps, dict) else steps
    wanted = pipe(**{**TANDEM, "steps": [(name.removeprefix("cloud:"), count) for name, count in pairs]})
    output = painted(bundle, str(server.base_url), {**TANDEM, "steps": steps})
    np.testing.assert_array_equal(output.latents, wanted.latents)
    assert output.images == wanted.images
    assert (output.degraded, len(output.cloud)) == ("", sum(name.startswith("cloud:") for name, _ in pairs))
    assert all(one.tries == 1 and one.sent_bytes > 100 and one.received_bytes > 1000 for one in output.cloud)
    there = sum(one.steps for one in output.cloud)
    assert there == sum(count for name, count in pairs if name.startswith("cloud:"))
    assert output.plan.steps == tuple((name, count) for name, count in pairs)
    assert len(output.timings.rows) == len(output.plan.ran) == sum(count for _, count in pairs) - there
    assert output.timings.total_ms > 1e3 * sum(one.seconds for one in output.cloud) + output.timings.denoise_ms


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"solver": "euler_a", "num_images_per_prompt": 2, "seed": [3, 4]}, {}),
        ({"height": 96, "guidance_interval": (0.0, 0.5), "negative_prompt": "blue"}, {}),
        ({"prompt": ["red", "blue"], "guidance_scale": 1.0}, {}),
        ({"seed": np.int64(7), "height": np.int64(64), "width": np.int32(96)}, {}),
        ({"seed": [np.int64(3), np.int64(4)], "num_images_per_prompt": np.int32(2)}, {}),
        ({"timesteps": np.array([900, 700, 500, 300, 100])}, {}),
        ({"guidance_scale": np.float32(3.5), "guidance_interval": (np.float32(0), np.float64(0.5))}, {}),
        ({"solver": "ddim", "eta": np.float64(0.5)}, {}),
    ],
)
def test_what_is_asked_for_is_sent(
    asked: Any, options: Any, bundle: Path, server: httpx.Client, pipe: Pipeline
) -> None:
    output = painted(bundle, str(server.base_url), {**TANDEM, **asked}, **options)
    assert output.degraded == ""
    np.testing.assert_array_equal(output.latents, pipe(**{**HERE, **asked}).latents)


def test_half_the_bytes_come_back(bundle: Path, server: httpx.Client, pipe: Pipeline) -> None:
    whole, half = (painted(bundle, str(server.base_url), half=half) for half in (False, True))
    assert half.cloud[0].received_bytes < 0.7 * whole.cloud[0].received_bytes
    np.testing.assert_allclose(half.latents, pipe(**HERE).latents, rtol=0.02, atol=0.02)


def test_half_the_bytes_go_up(bundle: Path, server: httpx.Client, pipe: Pipeline) -> None:
    steps = [("unet_free", 1), ("cloud:unet", 2), ("unet_free", 2)]
    job = {**TANDEM, "steps": steps}
    whole, half = (painted(bundle, str(server.base_url), job, half=half) for half in (False, True))
    assert whole.cloud[0].sent_bytes - half.cloud[0].sent_bytes == pytest.approx(2 * 2 * half.latents.size, abs=20)
    assert half.degraded == ""
    here = pipe(**{**TANDEM, "steps": [(name.removeprefix("cloud:"), count) for name, count in steps]})
    np.testing.assert_allclose(half.latents, here.latents, rtol=0.02, atol=0.02)


def test_what_had_arrived_is_gone_on_from(bundle: Path, server: httpx.Client, pipe: Pipeline) -> None:
    steps = [("cloud:unet", 1), ("unet_free", 1), ("cloud:unet", 2), ("unet", 1)]
    with (
        between(port_of(server), down=Faults(cut_after=10)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=20)) as edge,
    ):
        stream = edge.stream(**{**TANDEM, "steps": steps})
        assert next(stream).row == 1
        proxy.begin()
        assert [event.row for event in stream] == [2, 3, 4]
        output = stream.result()
    assert output.degraded.startswith("unreachable: ")
    assert output.plan.steps == (("cloud:unet", 1), ("unet_free", 4))
    assert [(one.steps, one.received_bytes > 0) for one in output.cloud] == [(1, True), (2, False)]
    assert [row.denoiser for row in output.timings.rows] == ["unet_free"] * 4
    wanted = pipe(**{**TANDEM, "steps": {"unet": 1, "unet_free": 4}})
    np.testing.assert_array_equal(output.latents, wanted.latents)
    assert output.images == wanted.images


# What befalls the bytes: whether the picture is yet that of both places, and else why it is not.
FAULTS: Mapping[str, tuple[Faults, Faults, str | None]] = {
    "a delay": (Faults(delay_s=0.2), Faults(delay_s=0.2), ""),
    "one cut answer": (Faults(), Faults(cut_after=300, connections=1), ""),
    "one cut request": (Faults(cut_after=100, connections=1), Faults(), ""),
    "one turned bit": (Faults(), Faults(corrupted=900, connections=1), ""),
    "one turned bit of the head": (Faults(), Faults(corrupted=3, connections=1), ""),
    "one turned bit of the request": (Faults(corrupted=330, connections=1), Faults(), None),
    "every answer cut": (Faults(), Faults(cut_after=500), "unreachable"),
    "every answer damaged": (Faults(), Faults(corrupted=900), "malformed"),
    "a black hole": (Faults(swallowed=True), Faults(), "deadline"),
    "no answer": (Faults(), Faults(swallowed=True), "deadline"),
    "drop by drop": (Faults(), Faults(bytes_per_s=200), "deadline"),
    "a request drop by drop": (Faults(bytes_per_s=50), Faults(), "deadline"),
    "late": (Faults(delay_s=3), Faults(), "deadline"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_network(name: str, bundle: Path, server: httpx.Client, pipe: Pipeline) -> None:
    up, down, reason = FAULTS[name]
    seconds = 0.4 if reason == "deadline" else SECONDS
    with between(port_of(server), up, down) as proxy:
        output = painted(bundle, proxy, seconds=seconds)
    degraded = output.degraded.partition(":")[0]
    if reason is not None:
        assert degraded == reason, output.degraded
    np.testing.assert_array_equal(output.latents, pipe(**(ALONE if degraded else HERE)).latents)
    assert (output.cloud[-1].steps, output.cloud[-1].received_bytes > 0) == (2, not degraded)
    assert output.plan.steps == ((("unet_free", 5),) if degraded else (("cloud:unet", 2), ("unet_free", 3)))


def test_stages_tell_what_makes_no_rows(bundle: Path, server: httpx.Client) -> None:
    steps = [("unet_free", 1), ("cloud:unet", 2), ("unet_free", 1)]
    with Pipeline.open(bundle, threads=1, cloud=str(server.base_url)) as edge:
        stream = edge.stream(**{**TANDEM, "steps": steps})
        seen = [one.row if isinstance(one, StepEvent) else one for one in stream.with_stages()]
        assert seen == [0, Stage.CLOUD, Stage.ENCODED, 3, Stage.SAMPLED]
        assert len(stream.result().images) == 1


@pytest.mark.parametrize("down", [Faults(swallowed=True), Faults(cut_after=10)], ids=["an answer", "the next try"])
def test_waiting_for_the_cloud_can_be_cancelled(
    down: Faults, bundle: Path, server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "_FIRST_PAUSE_S", 15.0)
    with (
        between(port_of(server), down=down) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=60)) as edge,
    ):
        proxy.begin()
        stream = edge.stream(**TANDEM)
        threading.Timer(0.15, stream.cancel).start()
        began = time.monotonic()
        with pytest.raises(CancelledError, match="cancelled while the cloud ran a part of it"):
            stream.result()
        assert time.monotonic() - began < 15


def test_a_size_that_cannot_be_painted_is_not_sent(bundle: Path, server: httpx.Client) -> None:
    with (
        between(port_of(server)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=f"http://127.0.0.1:{proxy.port}") as edge,
    ):
        proxy.begin()
        with pytest.raises(TandemError, match="height: "):
            edge(**TANDEM, height=65)
        assert (proxy.connections, proxy.sent) == (0, b"")


def test_nobody_there(bundle: Path, pipe: Pipeline) -> None:
    output = painted(bundle, "http://127.0.0.1:9")
    assert output.degraded.startswith("unreachable: http://127.0.0.1:9: cannot be reached")
    np.testing.assert_array_equal(output.latents, pipe(**ALONE).latents)


def test_a_model_that_inpaints_stands_in_for_none(tmp_path: Path) -> None:
    def smallest(manifest: Manifest) -> Manifest:
        inpaints = msgspec.structs.replace(manifest.components["unet_inpaint"], parameters=1)
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet_inpaint": inpaints})

    def alone(manifest: Manifest) -> Manifest:
        components = {name: one for name, one in manifest.components.items() if name != "unet"}
        return msgspec.structs.replace(manifest, components=components)

    write_tiny_editing(tmp_path / "bundle")
    resign(tmp_path / "bundle", smallest)
    output = painted(tmp_path / "bundle", "http://127.0.0.1:9", {**TANDEM, "steps": {"cloud:unet": 2}})
    assert output.degraded.startswith("unreachable: ")
    assert output.plan.steps == (("unet", 2),)
    shutil.rmtree(tmp_path / "bundle" / "unet")
    resign(tmp_path / "bundle", alone)
    for name in ("cloud:unet", "cloud:unet_inpaint"):  # of which it knows one by itself
        with pytest.raises(CloudError, match="cannot be reached"):
            painted(tmp_path / "bundle", "http://127.0.0.1:9", {**TANDEM, "steps": {name: 2}})


def test_a_token(bundle: Path, pipe: Pipeline) -> None:
    with serving(pipe, token=TOKEN) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert painted(bundle, str(client.base_url), token=TOKEN).degraded == ""
        refused = painted(bundle, str(client.base_url), token=f"{TOKEN}-expired")
    assert refused.degraded.startswith("unauthorized")
    assert "The token is missing or wrong" in refused.degraded
    with pytest.raises(TandemError, match="the token would go over the network in plain text"):
        Cloud("http://example.org", TOKEN)


@pytest.mark.parametrize(
    ("told", "url"),
    [
        ("no address, got", "example.org"),
        ("no address, got", "ftp://example.org"),
        ("no address .*[Pp]ort.*, got", "http://example.org:abc"),
        ("no address .*[Pp]ort.*, got", "http://example.org:99999"),
        ("no address .*IPv6.*, got", "http://[::1"),
        (r"an address with a user's name\. Leave", "https://user:secret@example.org"),
        (r"an address with a user's name\. Leave", "https://secret@example.org:abc"),
    ],
)
def test_addresses_that_are_none(told: str, url: str) -> None:
    with pytest.raises(ArgumentError, match=f"cloud: {told}") as refused:
        Cloud(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ("image: cannot be sent to the cloud", {"image": np.zeros((64, 64, 3), np.uint8)}),
        ("guidance: adaptive goes by .* beside steps in the cloud. Ask for another", {"guidance": "adaptive"}),
        (
            "placement: hybridiff goes by .* beside steps in the cloud. Ask for another placement",
            {"steps": {"cloud:unet": 25}, "placement": "hybridiff"},
        ),
        ("start, until: given beside steps in the cloud", {"until": 2}),
        ("steps: unknown denoiser, got 'cloud:unet_nowhere'", {"steps": {"cloud:unet_nowhere": 2}}),
    ],
)
def test_what_cannot_run_in_two_places(told: str, asked: Any, bundle: Path, server: httpx.Client) -> None:
    with (
        Pipeline.open(bundle, threads=1, cloud=str(server.base_url)) as edge,
        pytest.raises(TandemError, match=told),
    ):
        edge(**{**TANDEM, **asked})


def test_a_cloud_that_nobody_named(pipe: Pipeline) -> None:
    with pytest.raises(TandemError, match="steps: unknown denoiser, got 'cloud:unet'"):
        pipe(**TANDEM)


def test_a_token_goes_with_an_address(bundle: Path, pipe: Pipeline) -> None:
    with serving(pipe, token=TOKEN) as served:
        with Pipeline.open(bundle, threads=1, cloud=str(served.base_url), token=TOKEN) as edge:
            assert edge(**TANDEM).degraded == ""
        for where in (None, Cloud(str(served.base_url))):
            with pytest.raises(ArgumentError, match="token: given without a server's address"):
                Pipeline.open(bundle, threads=1, cloud=where, token=TOKEN)
