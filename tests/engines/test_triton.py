"""`tandemrt export-triton`: a repository by Triton's own schema and rules, whose graphs give what the bundle's do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from tritonclient.grpc.model_config_pb2 import DataType, ModelInstanceGroup

from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.engines.triton import RECORD_NAME, Record
from tandemrt.engines.triton_config import Model, config
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import ExportError
from tandemrt.runtime.files import file_sha256
from tandemrt.runtime.manifest import TensorSpec

from .triton_repositories import SIZES, Export, configs, parsed

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(int64)": "TYPE_INT64"}


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
def test_models_are_those_of_the_bundle(which: str, to_triton: Export, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    out = to_triton(path, "--profile", SIZES)
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


def test_what_triton_puts_together_is_what_each_would_get(shapes_bundle: Path, to_triton: Export) -> None:
    out = to_triton(shapes_bundle, "--profile", SIZES)
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


def test_time_steps_are_a_number_a_sample(shapes_bundle: Path, to_triton: Export) -> None:
    out = to_triton(shapes_bundle, "--component", "unet", "--target", "onnxruntime:cuda:fp32")
    (made,) = configs(out).values()
    assert made.max_batch_size == 2  # both branches of guidance of one picture
    timestep = next(one for one in made.input if one.name == "timestep")
    assert (list(timestep.dims), timestep.HasField("reshape"), list(timestep.reshape.shape)) == ([1], True, [])
    (group,) = made.instance_group
    assert (group.kind, group.count, list(group.profile)) == (ModelInstanceGroup.KIND_GPU, 1, [])


def test_a_graph_that_takes_no_batches(tiny_path: Path, to_triton: Export) -> None:
    out = to_triton(tiny_path)
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
