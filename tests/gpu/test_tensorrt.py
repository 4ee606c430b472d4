"""TensorRT's flavours, those that are installed: the CPU's pictures, CUDA graphs, shared scratch memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tandemrt.bench.shapes.bundle import export_plan
from tandemrt.export.bundle import export_bundle
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.backends.tensorrt import TensorRtSession
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import find_engine
from tandemrt.runtime.errors import EngineError, ExecutionError
from tandemrt.runtime.targets import Target

from ..interop.picture import psnr_db
from .conftest import FLAVOURS, Build, Painted, device_of

pytestmark = pytest.mark.gpu

SHAPES = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 24, 128)}


def opened(bundle: Bundle, name: str, component: str) -> TensorRtSession:
    found = find_engine(bundle, component, Target(name, cuda.device().architecture))
    return TensorRtSession(found.folder, found.engine)


def fill(binding: object, seed: int) -> None:
    random = np.random.default_rng(seed)
    for array in binding.inputs.values():  # type: ignore[attr-defined]
        array[...] = random.standard_normal(array.shape)


def test_a_flavour_is_installed() -> None:
    assert FLAVOURS


def test_pictures_equal_those_of_onnxruntime(shapes_bundle: Path, name: str, build: Build, painted: Painted) -> None:
    build(shapes_bundle, name)
    for arguments in ({}, {"num_inference_steps": None, "steps": {"unet": 4, "unet_small": 4}}):
        expected = painted(shapes_bundle, "onnxruntime:cpu:fp32", **arguments)
        ours = painted(shapes_bundle, f"{name}:{device_of(name)}:fp32", **arguments)
        assert psnr_db(ours, expected) >= 60.0
    with pytest.raises(EngineError, match="has no profile for this call"):
        painted(shapes_bundle, f"{name}:{device_of(name)}:fp32", height=128, width=128)


def test_pictures_in_fp16(shapes_bundle: Path, name: str, build: Build, painted: Painted, tmp_path: Path) -> None:
    half = tmp_path / "half"
    export_bundle(replace(export_plan(half), dtype="fp16"))
    build(half, name)
    expected = painted(shapes_bundle, "onnxruntime:cpu:fp32")
    assert psnr_db(painted(half, f"{name}:{device_of(name)}:fp16"), expected) >= 35.0


def test_a_graph_that_is_launched_equals_a_plain_run(shapes_bundle: Path, name: str, build: Build) -> None:
    session = opened(build(shapes_bundle, name, "unet"), name, "unet")
    plain, recorded = session.bind(SHAPES), session.bind(SHAPES)
    for _ in range(2):
        recorded.run()
    assert recorded._graph is not None
    for seed in range(3):
        fill(recorded, seed)
        recorded.run()
        plain = session.bind(SHAPES)
        fill(plain, seed)
        plain.run()
        assert plain._graph is None
        np.testing.assert_array_equal(recorded.outputs["out_sample"], plain.outputs["out_sample"])
    session.close()
    with pytest.raises(ExecutionError, match="the model is closed"):
        recorded.run()


def test_a_chain_of_runs_equals_one_after_another(shapes_bundle: Path, name: str, build: Build) -> None:
    session = opened(build(shapes_bundle, name, "unet"), name, "unet")
    rows = [{"timestep": np.full(2, step, np.float32)} for step in (900.0, 600.0, 300.0)]
    one, chained = session.bind(SHAPES), session.bind(SHAPES)
    for binding in (one, chained):
        fill(binding, 0)
        binding.run()
    for index, row in enumerate(rows):
        one.inputs["timestep"][...] = row["timestep"]
        if index:
            one.inputs["sample"][...] = one.outputs["out_sample"]
        one.run()
    chain = chained.chain(rows, {"sample": "out_sample"})
    for _ in range(2):
        chain.run()
        np.testing.assert_array_equal(chained.outputs["out_sample"], one.outputs["out_sample"])


def test_engines_share_their_scratch_memory(shapes_bundle: Path, name: str, build: Build) -> None:
    bundle = build(shapes_bundle, name, "unet", "unet_small")
    bindings = [opened(bundle, name, component).bind(SHAPES) for component in ("unet", "unet_small")]
    alone = []
    for binding in bindings:
        fill(binding, 0)
        binding.run()
        alone.append(binding.outputs["out_sample"].copy())
    for _ in range(3):
        for binding, expected in zip(bindings, alone, strict=True):
            binding.run()
            np.testing.assert_array_equal(binding.outputs["out_sample"], expected)
    assert bindings[0]._scratch is bindings[1]._scratch is cuda.device().scratch.reserved(0)


@pytest.mark.skipif("tensorrt-rtx" not in FLAVOURS, reason="only TensorRT for RTX compiles kernels where it runs")
def test_compiled_kernels_are_kept_and_read_again(shapes_bundle: Path, build: Build) -> None:
    bundle = build(shapes_bundle, "tensorrt-rtx", "unet")
    first = opened(bundle, "tensorrt-rtx", "unet")
    assert not first._kernels.reused
    binding = first.bind(SHAPES)
    binding.run()
    first.close()
    second = opened(bundle, "tensorrt-rtx", "unet")
    assert second._kernels.reused
    again = second.bind(SHAPES)
    again.run()
    np.testing.assert_array_equal(again.outputs["out_sample"], binding.outputs["out_sample"])
