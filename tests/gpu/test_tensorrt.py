"""TensorRT's flavours, those that are installed: the CPU's pictures, CUDA graphs, shared scratch memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tandemrt.bench.shapes.bundle import export_plan
from tandemrt.engines.flavour import Options
from tandemrt.export.bundle import export_bundle
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.backends.tensorrt import TensorRtSession
from tandemrt.runtime.base_weights import BaseWeights, Changes
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.errors import EngineError, ExecutionError
from tandemrt.runtime.lora_slots import Adapter, LowRank
from tandemrt.runtime.onnx_files import projections
from tandemrt.runtime.output import Output
from tandemrt.runtime.targets import Target

from ..engines.tandem import ROWS, WINDOW, build_stages
from ..interop.picture import psnr_db
from ..runtime.lora_writing import write_lora
from .conftest import FLAVOURS, PROMPT, Build, Painted, device_of

pytestmark = pytest.mark.gpu

SHAPES = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 24, 128)}


def opened(bundle: Bundle, name: str, component: str) -> TensorRtSession:
    found = fitting_engines(bundle, component, Target(name, cuda.device().architecture))[0]
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
    fill(chained, 0)
    chain = chained.chain([(chained, row.keys()) for row in rows], {"sample": "out_sample"})
    for given, row in zip(chain.rows, rows, strict=True):
        given["timestep"][...] = row["timestep"]
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
    shared = [binding.scratch() for binding in bindings if binding.scratch is not None]
    assert shared == [cuda.device().scratches[0].reserved(0)] * 2


def test_loras_come_and_go_by_refitting(shapes_bundle: Path, name: str, build: Build) -> None:
    bundle = build(shapes_bundle, name, "unet", options=Options(refit=True))
    session, base = opened(bundle, name, "unet"), BaseWeights(bundle.model_path("unet"))
    binding, random = session.bind(SHAPES), np.random.default_rng(3)
    fill(binding, 0)
    feeds = {key: array.copy() for key, array in binding.inputs.items()}
    loras = [lora(base, seed) for seed in (1, 2)]

    def ran(*adapters: Adapter) -> np.ndarray:
        session.refit(base, Changes(base, adapters))
        for _ in range(3):  # the second run is recorded, the third launched
            binding.run()
        return np.array(binding.outputs["out_sample"])

    plain = ran()
    walk = [(), (loras[0],), (loras[1],), tuple(loras), ()]
    for adapters in [walk[index] for index in random.permutation(len(walk))]:
        found, expected = ran(*adapters), of_onnxruntime(bundle.model_path("unet"), base, adapters, feeds)
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(ran(), plain)


@pytest.mark.parametrize("step", [False, True])
def test_a_pipelines_loras_come_and_go_by_refitting(
    shapes_bundle: Path, name: str, build: Build, tmp_path: Path, step: bool
) -> None:
    """From the base to A, to B, to both, and back: what slots paint, on engines that have none."""
    parts = {part: projections(shapes_bundle / part / "model.onnx") for part in ("unet", "text_encoder")}
    a = write_lora(tmp_path / "a.safetensors", parts, rank=4, seed=1)
    b = write_lora(tmp_path / "b.safetensors", {"unet": parts["unet"]}, rank=3, seed=2, layout="diffusers")
    walk: list[dict[Path, float]] = [{}, {a: 0.8}, {b: 0.5}, {a: 0.8, b: 0.5}, {}]
    request: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 7, "output_type": "latent"}
    target = f"{name}:{device_of(name)}:fp32"

    def painted() -> list[Output]:
        with Pipeline.open(shapes_bundle, target) as pipe:
            return [pipe(**request, placement="batched", loras=wanted) for wanted in walk]

    build(shapes_bundle, name, options=Options(refit=True))
    if step:
        build(shapes_bundle, name, "unet", options=Options(refit=True), step=True)
    refitted = painted()
    assert all("refitted" in one.variant for made in refitted[1:4] for one in made.timings.ran_on["unet"])
    assert all(made.timings.step_engines == step for made in refitted)
    np.testing.assert_array_equal(refitted[-1].latents, refitted[0].latents)
    for part in parts:
        build(shapes_bundle, name, part, lora_slots=2, lora_rank=4)
    slotted = painted()
    assert all("slots" in one.variant for made in slotted[1:4] for one in made.timings.ran_on["unet"])
    for ours, theirs in zip(refitted, slotted, strict=True):
        assert np.abs(ours.latents - theirs.latents).max() <= 5e-3 * np.abs(theirs.latents).max()
    for index in (1, 2, 3):
        assert np.abs(refitted[index].latents - refitted[0].latents).max() > 0.01


def test_an_engine_without_refit_says_so(shapes_bundle: Path, name: str, build: Build) -> None:
    session = opened(build(shapes_bundle, name, "unet"), name, "unet")
    with pytest.raises(EngineError, match=r"unet: cannot be refitted.*--refit"):
        session.refit({}, {})


def lora(base: BaseWeights, seed: int) -> Adapter:
    """A LoRA of rank 4 on every projection to queries."""
    random = np.random.default_rng(seed)
    changes = {}
    for module, one in base.projections.items():
        if module.endswith("to_q"):
            made, read = one.shape
            down, up = (random.normal(0, 1 / 8, shape).astype(np.float32) for shape in ((4, read), (made, 4)))
            changes[module] = LowRank(down, up)
    return Adapter(f"lora {seed}", changes, 0.7)


def of_onnxruntime(
    model: Path, base: BaseWeights, adapters: tuple[Adapter, ...], feeds: dict[str, np.ndarray]
) -> np.ndarray:
    """The output with the changes in the graph's weights."""
    loaded, added = onnx.load(model), Changes(base, adapters)
    for tensor in loaded.graph.initializer:
        if tensor.name in added:
            values = numpy_helper.to_array(tensor) + added[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return np.asarray(onnxruntime.InferenceSession(loaded.SerializeToString()).run(["out_sample"], feeds)[0])


@pytest.mark.skipif("tensorrt-rtx" not in FLAVOURS, reason="only TensorRT for RTX compiles kernels where it runs")
def test_compiled_kernels_are_kept_and_read_again(shapes_bundle: Path, build: Build) -> None:
    bundle = build(shapes_bundle, "tensorrt-rtx", "unet")
    first = opened(bundle, "tensorrt-rtx", "unet")
    assert not first._kernels.kept
    binding = first.bind(SHAPES)
    binding.run()
    first.close()
    second = opened(bundle, "tensorrt-rtx", "unet")
    assert second._kernels.kept
    again = second.bind(SHAPES)
    again.run()
    np.testing.assert_array_equal(again.outputs["out_sample"], binding.outputs["out_sample"])


def test_branches_on_two_streams_paint_what_one_call_does(
    shapes_bundle: Path, name: str, build: Build, painted: Painted
) -> None:
    build(shapes_bundle, name)
    target = f"{name}:{device_of(name)}:fp32"
    expected = painted(shapes_bundle, target)
    for placement in ("sequential", "parallel", "auto"):
        assert psnr_db(painted(shapes_bundle, target, placement=placement), expected) >= 60.0


def test_a_window_of_stages_is_that_of_onnxruntime(
    shapes_bundle: Path, name: str, build: Build, painted: Painted, tmp_path: Path
) -> None:
    """On one GPU, whose streams run the stages at once; both have their engines in the cache of `build`."""
    build(shapes_bundle, name)
    build(shapes_bundle, name, "unet", profiles=("64:b1",), stages=2)
    build_stages(shapes_bundle, tmp_path, "unet", 2)
    asked: dict[str, Any] = {"num_inference_steps": ROWS, "placement": "hybridiff", "placement_config": WINDOW}
    expected = painted(shapes_bundle, "onnxruntime:cpu", **asked)
    whole = painted(shapes_bundle, "onnxruntime:cpu", num_inference_steps=ROWS)
    ours = painted(shapes_bundle, f"{name}:{device_of(name)}:fp32", **asked)
    assert psnr_db(ours, expected) >= 60.0 > psnr_db(ours, whole)
