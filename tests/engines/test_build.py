"""Engines of small graphs: what is built runs and gives the graph's numbers; what cannot be built leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import openvino
import pytest

from tandemrt.engines import ingredients
from tandemrt.engines import plan as plans
from tandemrt.engines.build import changes, ensure_engine, nearest
from tandemrt.engines.tensorrt import layer_of
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.engine_files import PROOF_NAME, InputRange, Layer, check_engine_files, read_layers, read_sidecar
from tandemrt.runtime.errors import EngineError, TargetError
from tandemrt.runtime.variant import Variant

from .conftest import Requests

TARGETS = ("onnxruntime:cpu", "openvino:cpu", "tensorrt-rtx:portable")
VERSIONS = {"tandemrt": "0"}
FEEDS = {
    "sample": np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32),
    "timestep": np.array([500.0], np.float32),
    "encoder_hidden_states": np.random.default_rng(1).standard_normal((2, 12, 8)).astype(np.float32),
}


def silent(label: str, done: int, total: int) -> None:
    """Report to nobody."""


def left_in(cache: Path) -> list[str]:
    folder = engines_folder(cache)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def reference(bundle: Bundle) -> np.ndarray[Any, Any]:
    return onnxruntime.InferenceSession(bundle.model_path("unet")).run(None, FEEDS)[0]


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_is_built_once_and_says_what_it_is(target: str, requests: Requests, tmp_path: Path) -> None:
    (request,) = requests(target, components=("unet",))
    first = ensure_engine(request, tmp_path, silent, VERSIONS)
    again = ensure_engine(request, tmp_path, silent, VERSIONS)
    assert (first.built, again.built) == (True, False)
    assert first.folder == again.folder == engines_folder(tmp_path) / request.key
    assert left_in(tmp_path) == [request.key]
    engine = read_sidecar(first.folder)
    check_engine_files(first.folder, engine)
    assert engine == first.engine == again.engine
    assert {path.name for path in first.folder.iterdir()} - {PROOF_NAME} == {
        *engine.files,
        "engine.json",
        "layers.json",
    }
    layers = read_layers(first.folder)
    assert engine.layer_count == len(layers)
    assert {layer.kind for layer in layers if "onv" in layer.name or "onv" in layer.kind}
    assert engine.ingredients.backend in engine.versions
    assert engine.peak_memory_bytes > 1 << 20


def test_an_onnxruntime_engine_gives_the_graphs_numbers(tiny: Bundle, requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    folder = ensure_engine(request, tmp_path, silent, VERSIONS).folder
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (found,) = onnxruntime.InferenceSession(folder / "model.onnx", options).run(None, FEEDS)
    np.testing.assert_allclose(found, reference(tiny), atol=1e-5)


@pytest.mark.parametrize(("profile", "shape"), [("64:guided", "[2,4,8,8]"), ("64..96", "[1..2,4,8..12,8..12]")])
def test_an_openvino_engine_gives_the_graphs_numbers(
    profile: str, shape: str, tiny: Bundle, requests: Requests, tmp_path: Path
) -> None:
    (request,) = requests("openvino:cpu", components=("unet",), profiles=(profile,))
    outcome = ensure_engine(request, tmp_path, silent, VERSIONS)
    blob = BytesIO((outcome.folder / "engine.blob").read_bytes())
    # A blob forgets the precision it was compiled for.
    compiled = openvino.Core().import_model(blob, "CPU", outcome.engine.ingredients.flags)
    assert str(compiled.input("sample").partial_shape) == shape
    found = compiled(FEEDS)[compiled.output("out_sample")]
    np.testing.assert_allclose(found, reference(tiny), atol=1e-5)


def test_a_tensorrt_rtx_engine_serves_all_its_profiles(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests(
        "tensorrt-rtx:sm120+sm89", components=("vae_decoder",), profiles=("64", "wide=128x64", "64:b2")
    )
    assert request.ingredients.device == "sm89+sm120"
    # A decoder takes one picture a call, so b2 changes nothing.
    assert request.profile_names == ("64, 64:b2", "wide")
    engine = ensure_engine(request, tmp_path, silent, VERSIONS).engine
    assert len(engine.profile_memory_bytes) in (0, 2)
    assert [ranges["latent_sample"].max for ranges in engine.ingredients.profiles] == [(1, 4, 8, 8), (1, 4, 8, 16)]


def test_layers_are_read_from_what_the_builder_prints() -> None:
    line = (
        "Name: a/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: x, Datatype: Float }], Constants: [], "
        "Outputs: [ { Name: y, Dimensions: [-1,4], Datatype: Half, Format: (NHWC) }], TacticName: , StreamId: 0, "
        "Metadata: [ONNX Layer: a/Conv][ONNX Layer: a/Relu]"
    )
    assert layer_of(line) == Layer(
        name="a/Conv_myl0_2", kind="correlation", precision="half", nodes=("a/Conv", "a/Relu")
    )
    assert layer_of("Engine Layer Information:") is None


def test_the_key_is_of_everything_the_engine_depends_on(
    requests: Requests, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(target: str = "openvino:cpu", profile: str = "64", component: str = "unet") -> str:
        (request,) = requests(target, components=(component,), profiles=(profile,))
        return request.key

    base = key()
    assert base == key()
    assert base == key(profile="named=64")
    others = [key("onnxruntime:cpu"), key(profile="128"), key(component="unet_small"), key("tensorrt-rtx:sm89"),
              key("tensorrt-rtx:sm120"), key("tensorrt-rtx:portable")]  # fmt: skip
    monkeypatch.setattr(ingredients, "installed_version", lambda backend: "2030.1")
    others.append(key())
    monkeypatch.setattr(ingredients, "architecture_of", lambda target: "another machine")
    others.append(key())
    assert len({base, *others}) == 1 + len(others)


def test_what_changed_is_said(requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    assert changes(request, tmp_path) is None
    built = ensure_engine(request, tmp_path, silent, VERSIONS)
    assert changes(request, tmp_path) == ()
    monkeypatch.setattr(ingredients, "installed_version", lambda backend: "2030.1")
    (newer,) = requests("onnxruntime:cpu", components=("unet",))
    version = request.ingredients.backend_version
    assert changes(newer, tmp_path) == (f"the backend version changed ({version} there, 2030.1 now)",)
    retrained = msgspec.structs.replace(request.ingredients, weights={"model.onnx.data": "0" * 64})
    other = plans.Request("unet", request.target, request.model, request.facts, retrained, ())
    assert changes(other, tmp_path) == ("the weights changed",)
    (elsewhere,) = requests("openvino:cpu", components=("unet",))
    assert changes(elsewhere, tmp_path) is None  # of another target nothing has changed
    (built.folder / "model.onnx").write_bytes(b"")
    assert changes(request, tmp_path) == (f"the engine in {built.folder} is damaged",)


def test_other_profiles_are_told_by_their_names(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",), profiles=("64",))
    ensure_engine(request, tmp_path, silent, VERSIONS)
    (wider,) = requests("openvino:cpu", components=("unet",), profiles=("wide=96x64",))
    assert changes(wider, tmp_path) == ("the profiles changed (64 there, wide now)",)


def test_without_an_engine_to_compare_with_the_nearest_is_named(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    ensure_engine(request, tmp_path, silent, VERSIONS)
    slots = Variant(lora_slots=2, lora_rank=4)
    made_of = msgspec.structs.replace(request.ingredients, variant=slots, graph="0" * 64)
    with_slots = replace(request, ingredients=made_of)
    elsewhere = replace(request, ingredients=msgspec.structs.replace(request.ingredients, device="cuda"))
    for other in (with_slots, elsewhere):  # nothing changed: it is the first of its kind
        assert changes(other, tmp_path) is None
        assert nearest(other, tmp_path) == "plain for onnxruntime:cpu:fp32"
    foreign = {"origin": "0" * 64, "graph": "0" * 64, "weights": {"model.onnx.data": "0" * 64}}
    another = replace(request, ingredients=msgspec.structs.replace(request.ingredients, **foreign))
    assert changes(another, tmp_path) is None
    assert nearest(another, tmp_path) == "plain for onnxruntime:cpu:fp32, of another graph and weights"
    assert nearest(replace(another, component="unet_small"), tmp_path) is None


def test_another_text_length_is_told(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",), profiles=("64:guided",))
    ensure_engine(request, tmp_path, silent, VERSIONS)
    (ranges,) = request.ingredients.profiles
    longer = InputRange(min=(2, 24, 8), opt=(2, 24, 8), max=(2, 24, 8))
    made_of = msgspec.structs.replace(request.ingredients, profiles=({**ranges, "encoder_hidden_states": longer},))
    told = "the profiles' shapes changed (encoder_hidden_states (2, 12, 8) there, (2, 24, 8) now)"
    assert changes(replace(request, ingredients=made_of), tmp_path) == (told,)


def test_a_damaged_engine_is_built_anew(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    first = ensure_engine(request, tmp_path, silent, VERSIONS)
    content = bytearray((first.folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (first.folder / "model.onnx").write_bytes(content)
    assert ensure_engine(request, tmp_path, silent, VERSIONS).built
    check_engine_files(first.folder, read_sidecar(first.folder))
    assert left_in(tmp_path) == [request.key]


def test_a_graph_the_backend_refuses_is_an_error(requests: Requests, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    for target in TARGETS:
        (request,) = requests(target, components=("unet",))
        refused = plans.Request("unet", request.target, broken, request.facts, request.ingredients, ())
        with pytest.raises(EngineError, match=r"^unet: "):
            ensure_engine(refused, tmp_path / "cache", silent, VERSIONS)
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "tensorrt-rtx:sm89:fp16",
            r"text_encoder: precision of the exported model, got 'fp32', expected fp16.*--dtype fp16",
        ),
        (
            "tensorrt-rtx:sm89:bf16",
            r"expected fp16 for .*:bf16\. Ask for tensorrt-rtx:sm89:fp32, or .*`tandemrt export --dtype fp16`",
        ),
        (
            "tensorrt-rtx:sm89:int8",
            r"nothing in it is quantized to int8.*`tandemrt calibrate quantize .*`, or ask for tensorrt-rtx:sm89",
        ),
        ("openvino:cpu:fp16", r"got 'fp32', expected fp16"),
        (
            "tensorrt-rtx:sm75+sm89",
            r"text_encoder: TensorRT-RTX builds no matrix products in fp32 .*got 'sm75', expected sm80 or newer\. "
            r"Export .* --dtype fp16`, or leave sm75 out",
        ),
        ("onnxruntime:tensorrt-rtx", r"compiles when it loads a graph.*or build for tensorrt-rtx\."),
        ("onnxruntime:cuda", r"execution provider that is not here"),
        ("openvino:gpu", r"device that is not here, got 'gpu', expected one of .*cpu"),
        ("openvino:npu", r"takes fixed shapes alone.*Build for openvino:cpu"),
    ],
)
def test_what_a_target_lacks_is_refused_before_the_build(target: str, message: str, requests: Requests) -> None:
    with pytest.raises(TargetError, match=message):
        requests(target)


def test_tensorrt_needs_its_gpu(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandemrt.engines import flavour  # noqa: PLC0415

    monkeypatch.setattr(flavour, "imported", lambda backend: None)
    monkeypatch.setattr(flavour, "has_nvidia_driver", lambda: False)
    with pytest.raises(TargetError, match=r"no NVIDIA driver is running here.*tensorrt-rtx, which needs none"):
        requests("tensorrt:sm90")


def test_bf16_is_built_where_the_processor_has_it(requests: Requests, tmp_path: Path) -> None:
    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if not able:
        with pytest.raises(TargetError, match="no instructions for the precision"):
            requests("openvino:cpu:bf16", components=("unet",))
        return
    (request,) = requests("openvino:cpu:bf16", components=("unet",))
    folder = ensure_engine(request, tmp_path, silent, VERSIONS).folder
    assert "bf16" in {layer.precision for layer in read_layers(folder)}
