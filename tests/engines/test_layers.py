"""Layer by layer against ONNX Runtime in float32: a divergence that was planted is found at its very node."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from polygraphy.json import load_json

from tandemrt.engines import layers
from tandemrt.engines.build import ensure_engine
from tandemrt.engines.cache import records_of
from tandemrt.engines.layer_graphs import batches, giving, values_of
from tandemrt.engines.layer_inputs import recorded_inputs
from tandemrt.engines.layer_parts import boundaries, part_making
from tandemrt.engines.layers import compare_layers, relative_error
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import SIDECAR_NAME, read_sidecar
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.targets import parse_target

from ..runtime.tiny_bundle import resign
from ..runtime.tiny_families import (
    write_tiny_control,
    write_tiny_editing,
    write_tiny_lcm,
    write_tiny_sd3,
    write_tiny_sdxl,
)
from .conftest import Requests
from .test_build import VERSIONS, silent

SIZE = (64, 64)
ONE = ["--layers", "--target", "onnxruntime:cpu", "--component", "unet"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edited(source: Path, folder: Path, edit: Callable[[onnx.ModelProto], None], precision: str = "fp32") -> Bundle:
    """A copy of a bundle with another graph of its unet."""
    shutil.copytree(source, folder)
    model = onnx.load(folder / "unet" / "model.onnx")
    edit(model)
    onnx.save(model, folder / "unet" / "model.onnx")

    def stated(manifest: Manifest) -> Manifest:
        unet = msgspec.structs.replace(manifest.components["unet"], precision=precision)
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet": unet})

    resign(folder, stated)
    return Bundle.open(folder)


def overflow(model: onnx.ModelProto) -> None:
    """Let the first convolution's result pass through float16, multiplied and divided by what makes it overflow."""
    for name, value in (("much", 3e4), ("back", 1 / 3e4)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float16), name))
    place = next(index for index, node in enumerate(model.graph.node) if node.op_type == "Conv")
    result = model.graph.node[place].output[0]
    model.graph.node[place].output[0] = "convolved"
    added = [
        helper.make_node("Cast", ["convolved"], ["half"], name="half/Cast", to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "much"], ["large"], name="grown/Mul"),
        helper.make_node("Mul", ["large", "back"], ["again"], name="shrunk/Mul"),
        helper.make_node("Cast", ["again"], [result], name="whole/Cast", to=TensorProto.FLOAT),
    ]
    for offset, node in enumerate(added, 1):
        model.graph.node.insert(place + offset, node)


def test_a_weight_that_changed_in_an_engine_is_found(
    tiny: Bundle, requests: Requests, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    folder = ensure_engine(request, cache, silent, VERSIONS).folder
    whole = compare_layers(tiny, "unet", parse_target("onnxruntime:cpu"), SIZE, silent)
    assert (whole.engine, whole.first, whole.diverges) == (str(folder), None, False)
    assert whole.compared > 5
    path = folder / "model.onnx"
    model = onnx.load(path)
    node = next(one for one in model.graph.node if one.name == "mul_10/Mul")
    (tensor,) = (one for one in model.graph.initializer if one.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path)
    engine = read_sidecar(folder)
    signed = msgspec.structs.replace(engine, files=records_of(folder, tuple(engine.files)))
    (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(signed))
    monkeypatch.setattr(layers, "BATCH_BYTES", 1)  # every value read alone
    changed = compare_layers(tiny, "unet", parse_target("onnxruntime:cpu"), SIZE, silent)
    assert changed.diverges and changed.compared == whole.compared
    assert changed.first is not None
    assert (changed.first.node, changed.first.op, changed.first.tensor) == ("mul_10/Mul", "Mul", "mul_10")
    assert changed.first.relative_error == pytest.approx(0.1, rel=0.01)
    part = compare_layers(tiny, "unet", parse_target("onnxruntime:cpu"), SIZE, silent, cache / "part.onnx").part
    assert part is not None and part.nodes == 1
    assert part.relative_error == pytest.approx(0.1, rel=0.01)


def test_an_overflow_in_float16_is_found(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = edited(tiny_path, tmp_path / "bundle", overflow, "fp16")
    command = ["verify", str(bundle.path), "--layers", "--target", "onnxruntime:cpu", "--component", "unet"]
    assert main([*command, "--json", "--size", "64"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["layers"]
    assert found["precision"] == "fp16" and found["diverges"] is True
    assert found["first"] == {
        "tensor": "large", "node": "grown/Mul", "op": "Mul", "shape": [1, 8, 8, 8], "relative_error": None
    }  # fmt: skip
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "unet on onnxruntime:cpu:fp16, the bundle's graph: 16 values compared, fp16 may be off by 0.02" in printed
    assert "first over it: grown/Mul (Mul), large (1, 8, 8, 8): NaN or Inf" in printed


def test_the_smallest_part_that_fails_is_cut_out(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = edited(tiny_path, tmp_path / "bundle", overflow, "fp16")
    path = tmp_path / "part.onnx"
    command = ["verify", str(bundle.path), "--layers", "--target", "onnxruntime:cpu", "--extract", str(path)]
    assert main([*command, "--component", "unet"]) == 1
    printed = capsys.readouterr().out
    assert "by itself 1 node that make it, given the reference's values, are off by NaN or Inf" in printed
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [node.name for node in model.graph.node] == ["grown/Mul"]
    assert [value.name for value in model.graph.input] == ["half"]
    (feeds,) = load_json(str(tmp_path / "part.inputs.json"))
    (made,) = onnxruntime.InferenceSession(path).run(None, feeds)
    assert np.isinf(made).any()
    assert main([*command, "--component", "unte"]) == 2
    assert "--component: no such component, got 'unte', expected one of" in capsys.readouterr().err
    assert main([*command, "--component", "unet"]) == 2
    assert f"--extract: already there, got '{path}'" in capsys.readouterr().err


def test_parts_grow_until_they_reach_the_inputs(tiny: Bundle) -> None:
    model = onnx.load(tiny.model_path("unet"))
    feeds = recorded_inputs(tiny, "unet", SIZE)
    shapes = {name: array.shape for name, array in feeds.items()}
    values = {value.name: value for value in values_of(model, shapes)}
    output = model.graph.output[0].name
    every = giving(model, list(values.values()), {})
    made = onnxruntime.InferenceSession(every.SerializeToString()).run(None, feeds)
    known = {**feeds, **dict(zip(values, made, strict=True))}
    sizes = []
    for names in boundaries(model, output, values):
        boundary = {name: values[name] for name in names}
        part = part_making(model, values[output], boundary, {name: array.shape for name, array in known.items()})
        onnx.checker.check_model(part, full_check=True)
        session = onnxruntime.InferenceSession(part.SerializeToString())
        given = {one.name: known[one.name] for one in session.get_inputs()}
        np.testing.assert_allclose(session.run(None, given)[0], known[output], atol=1e-6)
        sizes.append(len(part.graph.node))
    assert sizes[0] == 1 and sizes == sorted(set(sizes)) and len(sizes) > 2
    assert sizes[-1] == len(giving(model, [values[output]], {}).graph.node)


def test_openvino_departs_nowhere_in_fp32(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_path), "--layers", "--target", "openvino:cpu:fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    assert [one["component"] for one in found] == list(Bundle.open(tiny_path).manifest.components)
    for one in found:
        assert (one["diverges"], one["first"], one["threshold"]) == (False, None, 1e-3)
        assert one["compared"] >= 4
        assert 0 < max(difference["relative_error"] for difference in (*one["outputs"], *one["worst"])) < 1e-5


@pytest.mark.parametrize(
    "write", [write_tiny_sdxl, write_tiny_sd3, write_tiny_lcm, write_tiny_editing, write_tiny_control]
)
def test_every_component_is_given_what_a_generation_gives_it(write: Callable[[Path], Manifest], tmp_path: Path) -> None:
    write(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    for name, component in bundle.manifest.components.items():
        given = recorded_inputs(bundle, name, (bundle.manifest.defaults.width, bundle.manifest.defaults.height))
        assert given.keys() == {spec.name for spec in component.inputs}
        assert all(np.isfinite(array).all() for array in given.values())
        assert all(array.any() for key, array in given.items() if "residual" not in key and "time_ids" not in key)


def test_that_nothing_is_cut_out_is_said(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "part.onnx"
    assert main(["verify", str(tiny_path), *ONE, "--extract", str(path)]) == 0
    assert f"  {path} was not written: there is no value" in capsys.readouterr().out
    assert not path.exists()


def test_a_step_engine_does_not_run_in_the_place_of_what_is_watched(tiny_path: Path, tiny: Bundle, cache: Path) -> None:
    target = ["--target", "onnxruntime:cpu", "--component", "unet"]
    arguments = [*target, "--step", "--profile", "64:unguided", "--cache", str(cache)]
    assert main(["build-engine", str(tiny_path), *arguments]) == 0
    assert recorded_inputs(tiny, "unet", SIZE).keys() == {"sample", "timestep", "encoder_hidden_states"}


def test_neighbours_share_a_run_as_long_as_they_fit(tiny: Bundle) -> None:
    model = onnx.load(tiny.model_path("vae_decoder"))
    values = values_of(model, {"latent_sample": (1, 4, 8, 8)})
    assert [value.size_bytes for value in values] == [4 * 64 * 64 * channels for channels in (8, 8, 3, 3)]
    sizes = [tuple(value.kind for value in batch) for batch in batches(values, values[0].size_bytes)]
    assert sizes == [("ConvTranspose",), ("Tanh",), ("Conv", "Tanh")]
    early = giving(model, values[:1], {})
    assert [node.op_type for node in early.graph.node] == ["ConvTranspose"]
    assert [value.name for value in early.graph.output] == [values[0].name]


def test_what_counts_as_a_difference() -> None:
    numbers = np.array([1.0, -4.0, 0.5], np.float32)
    assert relative_error(numbers + np.float32(0.4), numbers) == pytest.approx(0.1)
    assert relative_error(np.array([1.0, np.inf, 0.5], np.float32), numbers) is None
    assert relative_error(numbers[:2], numbers) is None
    masked, other = np.array([1.0, -3.4e38], np.float32), np.array([1.0, -np.inf], np.float32)
    assert relative_error(other, masked) == 0.0
    assert relative_error(np.zeros(3, np.float32), np.zeros(3, np.float32)) == 0.0
    assert relative_error(numbers, np.zeros(3, np.float32)) is None


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--layers"], 2, "--layers: needs --target TARGET"),
        (["--target", "openvino:cpu"], 2, "--target: given without --layers"),
        (["--layers", "--target", "openvino:cpu", "--checkpoint", "x"], 2, "--layers: given beside --checkpoint"),
        (["--layers", "--target", "openvino:cpu", "--component", "unet_3"], 2, "'unet_3'"),
        (["--layers", "--target", "openvino:npu"], 1, "cannot run bundles on it"),
        (["--layers", "--target", "openvino:cpu:fp16"], 1, "precision of the exported model, got 'fp32'"),
        (["--layers", "--target", "onnxruntime:cpu", "--size", "9x"], 2, "--size: not a size"),
        (["--extract", "x.onnx"], 2, "--extract: given without --layers"),
        (
            ["--layers", "--target", "onnxruntime:cpu", "--extract", "x.onnx"],
            2,
            "needs one --target and one --component",
        ),
        ([*ONE, "--extract", "x.bin"], 2, "--extract: name of the file, got 'x.bin', expected one that ends in .onnx"),
        ([*ONE, "--extract", "/none/x.onnx"], 2, "--extract: no such folder, got '/none'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], status: int, message: str, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_path), *options]) == status
    assert message in capsys.readouterr().err


def test_a_target_of_a_gpu_is_refused_without_one(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandemrt.runtime import targets  # noqa: PLC0415

    monkeypatch.setattr(targets, "has_nvidia_driver", lambda: False)
    assert main(["verify", str(tiny_path), "--layers", "--target", "tensorrt-rtx:sm89"]) == 1
    assert "needs an NVIDIA GPU, and no NVIDIA driver is running here" in capsys.readouterr().err


CHOOSES = """
import sys
from tandemrt.engines import layer_runners
from tandemrt.runtime.errors import TargetError
layer_runners.require_polygraphy()
layer_runners._choose_flavour("tensorrt-rtx")
from polygraphy.backend.trt import network_from_onnx_path
_, network, _ = network_from_onnx_path(sys.argv[1], strongly_typed=True)
print(type(network).__module__)
layer_runners._choose_flavour("tensorrt-rtx")
try:
    layer_runners._choose_flavour("tensorrt")
except TargetError as error:
    print(error)
"""


def test_polygraphy_reads_graphs_with_the_flavour_that_is_asked_for(tiny: Bundle) -> None:
    command = [sys.executable, "-c", CHOOSES, str(tiny.model_path("unet"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    module, refused = ran.stdout.splitlines()[-2:]
    assert module.startswith("tensorrt_rtx")
    assert refused.startswith("tensorrt: Polygraphy uses the other flavour")


def test_a_damaged_engine_is_not_what_is_compared(tiny: Bundle, requests: Requests, cache: Path) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",), profiles=("64:unguided",))
    folder = ensure_engine(request, cache, silent, VERSIONS).folder
    target = parse_target("openvino:cpu:fp32")
    assert compare_layers(tiny, "unet", target, SIZE, silent).engine == str(folder)
    (folder / "engine.blob").write_bytes(b"damaged")
    assert compare_layers(tiny, "unet", target, SIZE, silent).engine is None
