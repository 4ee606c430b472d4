"""LoRAs of requests: which components they change, and what is refused before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Pipeline, Request, loras
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import CheckpointError, EngineError, RequestError
from tandemrt.runtime.lora_files import Lora, read_lora
from tandemrt.runtime.loras import Fitted, Loras
from tandemrt.runtime.onnx_files import projections
from tandemrt.runtime.variant import PLAIN, Variant

from .lora_writing import Shapes, write_lora, write_safetensors
from .tiny_bundle import write_tiny_bundle

DENOISERS = ("unet", "unet_small")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few kilobytes with two denoisers of different widths. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def shapes(path: Path) -> dict[str, Shapes]:
    return {name: projections(path / name / "model.onnx") for name in ("unet", "unet_small", "text_encoder")}


@pytest.fixture
def fitting(path: Path) -> Loras:
    return Loras(Bundle.open(path))


def fit(fitting: Loras, wanted: Mapping[Path, float], *, encodes: bool = True) -> Fitted:
    return fitting.fitted(wanted, DENOISERS, encodes=encodes)


def test_the_projections_of_a_graph_are_read_from_its_bytes(shapes: dict[str, Shapes]) -> None:
    assert shapes["unet"] == {"matmul_1": (8, 8), "conv_6": (8, 4, 3, 3), "conv_9": (4, 8, 1, 1)}
    assert shapes["unet_small"]["matmul_1"] == (4, 8)  # out, in: not as the graph stores it


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_lora_changes_the_denoisers_that_have_all_of_its_modules(
    fitting: Loras, shapes: dict[str, Shapes], tmp_path: Path, layout: str
) -> None:
    parts = {"unet": shapes["unet"], "text_encoder": shapes["text_encoder"]}
    both = write_lora(tmp_path / "both.safetensors", parts, rank=3, layout=layout)
    small = write_lora(tmp_path / "small.safetensors", {"unet": shapes["unet_small"]}, layout=layout)
    fitted = fit(fitting, {both: 0.8, small: -1.0})
    assert fitted.applied == {str(both): ("text_encoder", "unet"), str(small): ("unet_small",)}
    assert [fitted.variant(name).lora_rank for name in ("text_encoder", "unet", "unet_small")] == [3, 3, 2]
    assert fitted.variant("vae_decoder") == PLAIN
    again = fit(fitting, {both: 1.0, small: 1.0, write_lora(tmp_path / "c.safetensors", {"unet": shapes["unet"]}): 1})
    assert again.variant("unet") == Variant(lora_slots=2, lora_rank=3)


def test_modules_may_be_named_within_their_model(
    fitting: Loras, shapes: dict[str, Shapes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loras, "projections", lambda model: {f"unet.{name}": shape for name, shape in projections(model).items()}
    )
    for layout in ("kohya", "diffusers"):
        file = write_lora(tmp_path / f"{layout}.safetensors", {"unet": shapes["unet"]}, layout=layout)
        (adapter,) = fit(fitting, {file: 1.0}).in_slots("unet")
        assert set(adapter.changes) == {f"unet.{name}" for name in shapes["unet"]}


def test_what_a_change_adds_up_to_is_what_its_file_says(
    fitting: Loras, shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "x.safetensors", {"unet": shapes["unet"]}, rank=2)
    (adapter,) = fit(fitting, {file: 0.5}).in_slots("unet")
    tensors, change = read_lora(file).tensors, adapter.changes["conv_6"]
    down, up, alpha = (
        tensors.array(f"lora_unet_conv_6.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    expected = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down) * alpha / 2
    np.testing.assert_allclose((change.up @ change.down).reshape(expected.shape), expected, rtol=1e-6, atol=1e-8)


def test_a_file_is_read_once_until_it_changes(
    fitting: Loras, shapes: dict[str, Shapes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> Lora:
        read.append(path)
        return read_lora(path)

    monkeypatch.setattr(loras, "read_lora", counted)
    file = write_lora(tmp_path / "x.safetensors", {"unet": shapes["unet"]}, seed=1)
    first, second = (fit(fitting, {file: scale}).in_slots("unet")[0] for scale in (1.0, 0.5))
    assert read == [file]
    assert first.changes is second.changes
    assert first.key != second.key
    write_lora(tmp_path / "x.safetensors", {"unet": shapes["unet"]}, seed=2, rank=1)
    (third,) = fit(fitting, {file: 1.0}).in_slots("unet")
    assert len(read) == 2
    assert third.rank == 1
    assert third.key != first.key


def test_what_fits_nothing_is_refused_with_the_reason(
    fitting: Loras, shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    def refused(name: str, parts: Mapping[str, Shapes], complaint: str, **options: Any) -> None:
        file = write_lora(tmp_path / f"{name}.safetensors", parts, **options)
        with pytest.raises(RequestError, match=rf"^loras: .*{name}\.safetensors: {complaint}"):
            fit(fitting, {file: 1.0})

    strange = {**shapes["unet"], "conv_in": (8, 4, 3, 3)}
    refused(
        "strange", {"unet": strange}, r"fits no denoiser of the plan: unet has no lora_unet_conv_in \(1 of 4 updates\)"
    )
    wide = {**shapes["unet"], "conv_9": (4, 9, 1, 1)}
    refused(
        "wide", {"unet": wide}, r"fits no .*unet.weight of unet|fits no .*another shape, got \(4, 9, 1, 1\), expected"
    )
    refused("text", {"text_encoder": {"matmul_2": (8, 9)}}, r"text_encoder: .*got \(8, 9\), expected \(8, 8\)")
    second = {"text_encoder_2": {"matmul_2": (8, 8)}}
    refused("second", second, r"the bundle has no text_encoder_2, which 1 of its updates are for\. Give it to a bundle")
    refused("rank", {"unet": {"conv_9": (4, 8, 1, 1)}}, r"rank, got 1025, expected at most 1024\. Fuse it", rank=1025)


def test_text_encoders_that_do_not_run_need_no_slots(fitting: Loras, shapes: dict[str, Shapes], tmp_path: Path) -> None:
    parts = {"unet": shapes["unet"], "text_encoder": shapes["text_encoder"]}
    both = write_lora(tmp_path / "both.safetensors", parts)
    assert fit(fitting, {both: 1.0}, encodes=False).applied == {str(both): ("unet",)}
    text = write_lora(tmp_path / "text.safetensors", {"text_encoder": shapes["text_encoder"]})
    with pytest.raises(RequestError, match="changes text encoders alone, and embeddings are given"):
        fit(fitting, {text: 1.0}, encodes=False)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["x.safetensors"], "loras: not LoRAs, got .*expected scales by path"),
        ({3: 1.0}, "loras: not LoRAs"),
        ({"x": math.nan}, "loras: x: scale, got nan, expected a finite number"),
        ({"x": "0.8"}, "loras: x: scale, got '0.8'"),
        ({"x": 1.0, Path("x"): 1.0}, "loras: x: given twice"),
        ({f"{index}": 1.0 for index in range(17)}, "loras: how many there are, got 17, expected at most 16"),
    ],
)
def test_loras_that_are_none_are_refused_with_the_request(given: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        Request("red", loras=given)


def test_without_slots_the_command_that_makes_them_is_named(
    path: Path, shapes: dict[str, Shapes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    file = write_lora(tmp_path / "x.safetensors", {"unet": shapes["unet"]}, rank=3)
    command = r"tandemrt build-engine .* --target onnxruntime:cpu.* --component unet"
    command += r" --lora-slots 1 --lora-rank 3 --profile \d+x\d+:b1 --cache .*`"
    with Pipeline.open(path, "onnxruntime:cpu") as pipe:
        with pytest.raises(EngineError, match=command):
            pipe.stream("red", loras={file: 1.0})
        with pytest.raises(CheckpointError, match=r"missing\.safetensors: cannot be read"):
            pipe.stream("red", loras={"missing.safetensors": 1.0})
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="truncated"):
            pipe.stream("red", loras={file: 1.0})
        dora = write_safetensors(tmp_path / "dora.safetensors", {"unet.conv_9.dora_scale": np.ones((4, 1))})
        with pytest.raises(CheckpointError, match="DoRA is not supported"):
            pipe.stream("red", loras={dora: 1.0})
