"""`tandemrt export-triton`: a repository by Triton's own schema and rules, whose models give what the bundle's do.

Triton itself is not here, and no plan can be built or run without its GPU: of plans, what Triton is told and that it is
given the very file are tested, on files that stand in for them.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from tandemrt.engines import triton
from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.engines.triton import RECORD_NAME, Record
from tandemrt.engines.triton_config import Model, config
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import RECIPES, Engine, InputRange, read_sidecar
from tandemrt.runtime.errors import ExportError
from tandemrt.runtime.files import file_sha256
from tandemrt.runtime.manifest import TensorSpec

from ..runtime.engine_writing import write_engine

SIZES = "64x64:b1-b4"
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}
Export = Callable[..., Path]


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Export a bundle; the repository."""

    def export(bundle: Path, *options: str) -> Path:
        out = tmp_path / "models"
        assert main(["export-triton", str(bundle), str(out), *options]) == 0, capsys.readouterr().err
        return out

    return export


def configs(out: Path) -> dict[str, ModelConfig]:
    """The configurations of a repository, by model; what Triton's schema has not is an error."""
    return {path.parent.name: parsed(path.read_text("utf-8")) for path in sorted(out.glob("*/config.pbtxt"))}


def parsed(text: str) -> ModelConfig:
    made: ModelConfig = text_format.Parse(text, ModelConfig())
    return made


def graph_of(folder: Path) -> Path:
    """Where Triton's ONNX Runtime backend looks for a model's graph."""
    path = folder / "1" / "model.onnx"
    return path / "model.onnx" if path.is_dir() else path


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def told_shape(tensor: Any, most: int) -> list[int]:
    """The shape that a model is given or gives, by what is told of a tensor."""
    own = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return [*([-1] if most else []), *own]


def fed(bundle: Bundle, name: str, rows: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the largest call in SIZES, or of so many rows."""
    component = bundle.component(name)
    ranges = input_ranges(name, component, bundle.manifest, parse_profile(SIZES))
    random = np.random.default_rng(seed)
    feeds = {}
    for spec in component.inputs:
        shape = ranges[spec.name].max
        if rows is not None and isinstance(spec.shape[0], str):
            shape = (rows, *shape[1:])
        if spec.dtype == "int64":
            feeds[spec.name] = random.integers(0, 20, shape)
        else:
            scale = 500 if spec.name == "timestep" else 1
            feeds[spec.name] = (scale * random.random(shape)).astype(np.float32)
    return feeds


@pytest.mark.parametrize("which", ["tiny_path", "shapes_bundle"])
def test_models_are_those_of_the_bundle(which: str, export: Export, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    out = export(path, "--profile", SIZES)
    bundle = Bundle.open(path)  # its files have no second names
    found = configs(out)
    assert found.keys() == bundle.manifest.components.keys()
    for name, made in found.items():
        assert (made.name, made.platform) == (name, "onnxruntime_onnx")
        ours, theirs = session(graph_of(out / name)), session(bundle.model_path(name))
        for listed, tensors in ((made.input, ours.get_inputs()), (made.output, ours.get_outputs())):
            assert [one.name for one in listed] == [one.name for one in tensors]
            for one, tensor in zip(listed, tensors, strict=True):
                assert DataType.Name(one.data_type) == TYPES[tensor.type]
                # Triton compares shapes so, number by number, when it loads a graph.
                assert told_shape(one, made.max_batch_size) == [
                    size if isinstance(size, int) else -1 for size in tensor.shape
                ]
                assert one.dims
        feeds = fed(bundle, name)
        for own, other in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
            np.testing.assert_array_equal(own, other)


def test_what_triton_puts_together_is_what_each_would_get(shapes_bundle: Path, export: Export) -> None:
    out = export(shapes_bundle, "--profile", SIZES)
    bundle, found = Bundle.open(shapes_bundle), configs(out)
    sizes = {name: made.max_batch_size for name, made in found.items()}
    assert {bundle.component(name).role: size for name, size in sizes.items()} == {
        "text_encoder": 8,  # of four pictures, with and without guidance
        "denoiser": 8,
        "vae_decoder": 4,
        "vae_encoder": 4,
    }
    for name, made in found.items():
        assert made.HasField("dynamic_batching")
        model = session(graph_of(out / name))
        one, two = (fed(bundle, name, rows, seed) for rows, seed in ((1, 1), (2, 2)))
        together = model.run(None, {key: np.concatenate([one[key], two[key]]) for key in one})
        for whole, first, rest in zip(together, model.run(None, one), model.run(None, two), strict=True):
            np.testing.assert_allclose(whole, np.concatenate([first, rest]), rtol=1e-3, atol=1e-4)


def test_time_steps_are_a_number_a_sample(shapes_bundle: Path, export: Export) -> None:
    out = export(shapes_bundle, "--component", "unet", "--target", "onnxruntime:cuda:fp32")
    (made,) = configs(out).values()
    assert made.max_batch_size == 2  # both branches of guidance of one picture
    timestep = next(one for one in made.input if one.name == "timestep")
    assert (list(timestep.dims), timestep.HasField("reshape"), list(timestep.reshape.shape)) == ([1], True, [])
    (group,) = made.instance_group
    assert (group.kind, group.count, list(group.profile)) == (ModelInstanceGroup.KIND_GPU, 1, [])


def test_a_graph_that_takes_no_batches(tiny_path: Path, export: Export) -> None:
    out = export(tiny_path)
    made = configs(out)["unet"]  # whose time step is one for all rows
    assert (made.max_batch_size, made.HasField("dynamic_batching")) == (0, False)
    assert [list(one.dims) for one in made.input] == [[-1, 4, -1, -1], [1], [-1, -1, 8]]
    alone = configs(out)["vae_decoder"]  # of one picture a call
    assert (alone.max_batch_size, alone.HasField("dynamic_batching")) == (1, False)
    assert alone.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    # A graph with weights in a file of their own is a folder.
    assert sorted(path.name for path in (out / "unet" / "1" / "model.onnx").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]
    assert (out / "unet_small" / "1" / "model.onnx").is_file()
    record = msgspec.json.decode((out / RECORD_NAME).read_bytes(), type=Record)
    assert record.bundle == Bundle.open(tiny_path).digest
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert {name: file_sha256(path) for name, path in found.items() if name != RECORD_NAME} == {
        name: one.sha256 for name, one in record.files.items()
    }
    assert all(path.stat().st_nlink == 1 for path in found.values())


def test_names_and_types_are_told_whole() -> None:
    odd = TensorSpec(name='a"b\\\n/é', dtype="bfloat16", shape=("batch",))
    model = Model("unet", "tensorrt", (odd,), (odd,), most=4, preferred=(1, 2, 8), gpu=True, parameters={"k": "v"})
    made = parsed(config(model))
    assert made.input[0].name == odd.name
    assert made.input[0].data_type == DataType.Value("TYPE_BF16")
    assert list(made.dynamic_batching.preferred_batch_size) == [2]
    assert made.parameters["k"].string_value == "v"
    with pytest.raises(ExportError, match=r"unet: type of .*, got 'bfloat16', expected float32 or float16, which"):
        config(replace(model, backend="onnxruntime"))


def ranges(batches: tuple[int, int, int], sides: tuple[int, int, int]) -> dict[str, InputRange]:
    """A profile of the tiny decoder: least, best and most, of pictures and of their latents' sides."""
    shapes = [(batch, 4, side, side) for batch, side in zip(batches, sides, strict=True)]
    return {"latent_sample": InputRange(min=shapes[0], opt=shapes[1], max=shapes[2])}


NARROW = (ranges((1, 1, 1), (8, 8, 8)),)
WIDE = (ranges((1, 1, 4), (8, 8, 8)), ranges((1, 4, 8), (8, 8, 16)))


def write_plan(
    cache: Path, bundle: Path, *profiles: Mapping[str, InputRange], device: str = "sm90", **others: Any
) -> Path:
    """A file that stands in for a plan of the tiny decoder, in a cache; its folder."""
    opened = Bundle.open(bundle)
    before = set(engines_folder(cache).glob("*"))
    made_as = {"backend": "tensorrt", "backend_version": "10.13.2.6", "recipe": RECIPES["tensorrt"], **others}
    graph = onnx.load(opened.model_path("vae_decoder"))
    write_engine(cache, opened, "vae_decoder", device, graph, profiles=tuple(profiles), **made_as)
    (folder,) = set(engines_folder(cache).glob("*")) - before
    return folder


def decoder_on(cache: Path, *options: str) -> list[str]:
    return ["--component", "vae_decoder", "--target", "tensorrt:sm90", "--cache", str(cache), *options]


def test_plans(tiny_path: Path, tmp_path: Path, export: Export) -> None:
    cache = tmp_path / "cache"
    wide, narrow = write_plan(cache, tiny_path, *WIDE), write_plan(cache, tiny_path, *NARROW)
    write_plan(cache, tiny_path, *NARROW, device="sm89")
    write_plan(cache, tiny_path, *NARROW, precision="bf16")
    write_plan(cache, tiny_path, *NARROW, backend="tensorrt-rtx", recipe=RECIPES["tensorrt-rtx"])
    out = export(tiny_path, *decoder_on(cache, "--profile", "64..128x64..128"))
    (made,) = configs(out).values()
    engine: Engine = read_sidecar(wide)
    assert (made.platform, made.max_batch_size) == ("tensorrt_plan", 8)
    assert file_sha256(out / "vae_decoder" / "1" / "model.plan") == engine.files["model.engine"].sha256
    (group,) = made.instance_group
    assert (group.kind, list(group.profile)) == (ModelInstanceGroup.KIND_GPU, ["0", "1"])
    assert list(made.dynamic_batching.preferred_batch_size) == [4]
    assert made.parameters["tensorrt_version"].string_value == "10.13.2.6"
    assert [list(one.dims) for one in (*made.input, *made.output)] == [[4, -1, -1], [3, -1, -1]]
    record = msgspec.json.decode((out / RECORD_NAME).read_bytes(), type=Record)
    assert record.models["vae_decoder"].engine == wide.name
    shutil.rmtree(out)
    export(tiny_path, *decoder_on(cache))
    record = msgspec.json.decode((out / RECORD_NAME).read_bytes(), type=Record)
    assert record.models["vae_decoder"].engine == narrow.name


def test_plans_beside_graphs(
    tiny_path: Path, tmp_path: Path, export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    write_plan(cache, tiny_path, *NARROW, flags={"version_compatible": True})
    out = export(tiny_path, "--target", "vae_decoder=tensorrt:sm90:fp32", "--cache", str(cache))
    platforms = {name: made.platform for name, made in configs(out).items()}
    assert {name for name, platform in platforms.items() if platform == "tensorrt_plan"} == {"vae_decoder"}
    told = capsys.readouterr()
    assert "vae_decoder: tensorrt:sm90:fp32, batches up to 1, " in told.out
    assert "Triton has to bring TensorRT 10.13.2.6" in told.out
    assert "--backend-config=tensorrt,version-compatible=true" in told.err


def test_plans_that_do_not_fit(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, out = tmp_path / "cache", tmp_path / "models"
    cache.mkdir()

    def refused(*options: str) -> str:
        assert main(["export-triton", str(tiny_path), str(out), *decoder_on(cache, *options)]) == 1
        assert not out.exists()
        return capsys.readouterr().err

    build = (
        f"Run `tandemrt build-engine {tiny_path} --target tensorrt:sm90:fp32 --component vae_decoder --cache {cache} "
    )
    assert f"vae_decoder: no plan for tensorrt:sm90:fp32 fits: there is none (in {cache}). {build}" in refused()
    folder = write_plan(cache, tiny_path, *NARROW)
    told = refused("--profile", "64x64:b1..2", "--profile", "128x128:guided")
    assert f"{folder.name[:12]} has no profile for every call" in told
    assert "--profile 64x64:b1..2 --profile 128x128:b1:guided`." in told
    damaged = folder / "model.engine"
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    assert f"{damaged}: sha256" in refused()
    shutil.rmtree(folder)
    write_plan(cache, tiny_path, *NARROW)
    write_plan(cache, tiny_path, *NARROW, backend_version="10.14.1.48")
    assert "plans of several versions of TensorRT fit, got '10.13.2.6, 10.14.1.48'" in refused()


@pytest.mark.parametrize(
    ("status", "told", "options"),
    [
        (2, "Triton runs plans of TensorRT, and no engines of TensorRT-RTX, got 'tensorrt-rtx:sm89'",
         ["--target", "tensorrt-rtx:sm89"]),
        (2, "not exported for Triton, got 'openvino:cpu', expected one of onnxruntime:cpu, onnxruntime:cuda, tensorrt:",
         ["--target", "openvino:cpu"]),
        (2, "not exported for Triton, got 'unet=onnxruntime:tensorrt'", ["--target", "unet=onnxruntime:tensorrt"]),
        (2, "no component's name, got '=onnxruntime:cpu'", ["--target", "=onnxruntime:cpu"]),
        (2, "--target: given twice, got 'unet'",
         ["--target", "unet=onnxruntime:cpu", "--target", "unet=tensorrt:sm90"]),
        (2, "--component: no such component, got 'unet_smal'.*Did you mean", ["--component", "unet_smal"]),
        (2, "--component: given twice, got 'unet'", ["--component", "unet", "--component", "unet"]),
        (2, "--target: no such component, got 'nothing'", ["--target", "nothing=onnxruntime:cpu"]),
        (2, "--target: for a component that is left out, got 'unet'",
         ["--component", "vae_decoder", "--target", "unet=onnxruntime:cuda"]),
        (2, "--profile 65x65: width, got 65, expected a multiple of 16 pixels", ["--profile", "65x65"]),
        (2, "cache: not a folder that is there", ["--cache", "nowhere"]),
        (1, "precision of the exported model, got 'fp32'", ["--target", "onnxruntime:cuda:fp16"]),
        (1, "nothing in it is quantized to int8", ["--target", "onnxruntime:cpu:int8"]),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(
    status: int, told: str, options: list[str], tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-triton", str(tiny_path), str(tmp_path / "models"), *options]) == status
    err = capsys.readouterr().err
    assert re.search(told, err), err
    assert not (tmp_path / "models").exists()


def test_places(tiny_path: Path, tmp_path: Path, export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(bundle: Path, place: Path, *options: str) -> str:
        assert main(["export-triton", str(bundle), str(place), *options]) == 1
        return capsys.readouterr().err

    assert "nothing: not a bundle folder" in refused(tmp_path / "nothing", tmp_path / "models")
    out = export(tiny_path, "--component", "unet")
    assert "exists already. Give another folder, or --force to replace a repository." in refused(tiny_path, out)
    export(tiny_path, "--component", "vae_decoder", "--force")
    assert configs(out).keys() == {"vae_decoder"}
    (out / "vae_decoder" / "2").mkdir()
    told = refused(tiny_path, out, "--force")
    assert "2: is not of the repository, so --force does not remove it" in told
    assert f"expected a folder with {RECORD_NAME}" in refused(tiny_path, tiny_path.parent, "--force")
    assert "lies inside the bundle" in refused(tiny_path, tiny_path / "models")


def test_the_plan_is_shown(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export-triton", str(tiny_path), str(tmp_path / "models"), "--profile", SIZES, "--print-plan"]
    assert main(command) == 0
    assert "unet: onnxruntime:cpu:fp32, no batches, 0.0 MB" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert models["vae_decoder"]["max_batch_size"] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_repository_is_whole_or_not_there(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, copied = triton._copy, []

    def fills(source: Path, *others: Any) -> None:
        if copied:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        copied.append(source)
        copy(source, *others)

    monkeypatch.setattr(triton, "_copy", fills)
    assert main(["export-triton", str(tiny_path), str(tmp_path / "a" / "models")]) == 1
    assert "cannot be written (No space left on device). Free space or give another folder." in capsys.readouterr().err
    assert copied
    assert list(tmp_path.iterdir()) == []


def test_weights_pass_by_a_few_at_a_time(tmp_path: Path) -> None:
    source, place = tmp_path / "weights", tmp_path / "copy"
    with source.open("wb") as stream:
        stream.truncate(64 << 20)
    record = triton.FileRecord(size=64 << 20, sha256=file_sha256(source))
    tracemalloc.start()
    triton._copy(source, place, record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert place.stat().st_size == 64 << 20
    assert peak < 16 << 20
    with pytest.raises(ExportError, match=r"weights: changed while it was copied, got '.*', expected .* Run it again"):
        triton._copy(source, tmp_path / "other", msgspec.structs.replace(record, sha256="0" * 64))
