"""Step engines compute what the runtime's loop computes, bit for bit on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tandemrt.engines.composed import composed
from tandemrt.engines.graph_files import read_graph, spec, write_graph
from tandemrt.engines.step import HISTORY, step_graph
from tandemrt.runtime import manifest_files as manifests
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.errors import ArgumentError, BundleError, ExecutionError, PlanError
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.solvers import SOLVERS
from tandemrt.runtime.variant import Variant

from ..runtime.tiny_bundle import denoiser, write_tiny_bundle
from ..runtime.tiny_families import (
    write_tiny_control,
    write_tiny_editing,
    write_tiny_lcm,
    write_tiny_sd3,
    write_tiny_sdxl,
)
from .loops import Walk, conditioning, denoisers, engines, latent_shape, on_onnxruntime, on_openvino

FAMILIES: dict[str, Callable[[Path], Manifest]] = {
    "unet": write_tiny_bundle,
    "sdxl": write_tiny_sdxl,
    "sd3": write_tiny_sd3,
    "lcm": write_tiny_lcm,
    "steered": write_tiny_control,
}
Tiny = tuple[Path, Manifest]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def family(name: str) -> Tiny:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "bundle"
            made[name] = folder, FAMILIES[name](folder)
        return made[name]

    return family


def require_equal(fused: Any, unfused: Any) -> None:
    np.testing.assert_array_equal(fused[0].arrays, unfused[0].arrays)
    for mine, other in zip(fused[1], unfused[1], strict=True):
        np.testing.assert_array_equal(mine, other)
    assert np.isfinite(fused[0].arrays).all()
    assert fused[0].latents.std() > 0.1


def walked(bundle: Path, manifest: Manifest, schedule: Schedule, folder: Path, batch: int = 1) -> Walk:
    plan = compile_plan(manifest, schedule)
    walk = Walk(plan, conditioning(manifest, plan, batch), latent_shape(manifest, plan, batch))
    unfused = walk.end(walk.unfused(denoisers(bundle, plan)))
    require_equal(walk.end(walk.fused(engines(folder, bundle, plan, on_onnxruntime))), unfused)
    return walk


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_every_solver_is_equal_bit_for_bit(
    families: Callable[[str], Tiny], tmp_path: Path, solver: str, guidance_scale: float
) -> None:
    bundle, manifest = families("sd3" if solver == "flow_euler" else "unet")
    eta = 0.3 if solver in ("ddim", "tcd") else 0.0
    walked(bundle, manifest, Schedule(steps=6, solver=solver, guidance_scale=guidance_scale, eta=eta), tmp_path, 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_is_in_the_plan(
    families: Callable[[str], Tiny], tmp_path: Path, prediction_type: str
) -> None:
    config = {"prediction_type": prediction_type, "use_karras_sigmas": True}
    walked(*families("unet"), Schedule(steps=5, solver="dpmsolver++sde", solver_config=config), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_denoisers_compose(families: Callable[[str], Tiny], tmp_path: Path, family: str) -> None:
    bundle, manifest = families(family)
    first, second = manifest.names("denoiser")[:2]
    interval = (0.0, 0.5)
    schedule = Schedule(steps=((first, 3), (second, 3)), guidance_scale=4.0, guidance_interval=interval)
    walk = walked(bundle, manifest, schedule, tmp_path, batch=2)
    assert len(set(walk.plan.guided)) == (1 if family == "lcm" else 2)


def test_a_hybrid_plan_is_equal_and_goes_on_from_either_loop(families: Callable[[str], Tiny], tmp_path: Path) -> None:
    bundle, manifest = families("unet")
    steps = {"unet": 10, "unet_small": 15}
    plan = compile_plan(manifest, Schedule(steps=steps, solver="dpmsolver++", guidance_scale=7.0))
    walk = Walk(plan, conditioning(manifest, plan), latent_shape(manifest, plan))
    unfused = walk.unfused(denoisers(bundle, plan))
    fused = walk.fused(engines(tmp_path, bundle, plan, on_onnxruntime))
    expected = walk.end(unfused)
    require_equal(walk.end(fused), expected)
    require_equal(walk.end(unfused, fused, unfused, fused), expected)


def test_trained_denoisers_in_a_hybrid_plan_are_equal(shapes_bundle: Path, tmp_path: Path) -> None:
    manifest = manifests.decode((shapes_bundle / "tandem.json").read_bytes(), "shapes")
    walked(shapes_bundle, manifest, Schedule(steps={"unet": 2, "unet_small": 3}, guidance_scale=2.0), tmp_path)


def test_channels_behind_the_latent_reach_both_branches(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = write_tiny_editing(bundle)
    plan = compile_plan(manifest, Schedule(steps=[("unet_inpaint", 4)], guidance_scale=4.0))
    given = conditioning(manifest, plan)["unet_inpaint"]
    behind = np.random.default_rng(1).standard_normal((1, 5, 8, 16)).astype(np.float32)
    latents = []
    for channels in (behind, -behind):
        conditioned = {"unet_inpaint": Conditioning(given.conditional, given.unconditional, channels)}
        walk = Walk(plan, conditioned, (1, 4, 8, 16))
        unfused = walk.end(walk.unfused(denoisers(bundle, plan)))
        fused = walk.end(walk.fused(engines(tmp_path / "engines", bundle, plan, on_onnxruntime)))
        require_equal(fused, unfused)
        latents.append(fused[0].latents)
    assert np.abs(latents[0] - latents[1]).max() > 0.1


def test_an_engine_serves_the_schedules_its_state_has_room_for(families: Callable[[str], Tiny], tmp_path: Path) -> None:
    bundle, manifest = families("unet")
    carried = {}
    for solver in SOLVERS:
        if solver != "flow_euler":
            plan = compile_plan(manifest, Schedule(steps=20, solver=solver))
            carried[solver] = plan.table.history
    assert max(carried.values()) == HISTORY
    plan = compile_plan(manifest, Schedule(steps=4, solver="pndm"))
    walk = Walk(plan, conditioning(manifest, plan), latent_shape(manifest, plan))
    small = engines(tmp_path, bundle, plan, on_onnxruntime, history=1)
    with pytest.raises(PlanError, match=r"history that PNDMScheduler carries, got 3, expected at most 1"):
        walk.fused(small)


def test_openvino_runs_step_engines_with_parity(shapes_bundle: Path, tmp_path: Path) -> None:
    manifest = manifests.decode((shapes_bundle / "tandem.json").read_bytes(), "shapes")
    schedule = Schedule(steps={"unet_small": 3}, solver="dpmsolver++sde", guidance_scale=2.0)
    plan = compile_plan(manifest, schedule)
    walk = Walk(plan, conditioning(manifest, plan), latent_shape(manifest, plan))
    expected, _ = walk.end(walk.unfused(denoisers(shapes_bundle, plan)))
    got, _ = walk.end(walk.fused(engines(tmp_path, shapes_bundle, plan, on_openvino)))
    scale = np.abs(expected.latents).max()
    np.testing.assert_allclose(got.latents, expected.latents, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("timesteps", [(), (999.0,), (999.0, 500.0)])
@pytest.mark.parametrize("step", ["guided", "unguided"])
def test_tensorrt_rtx_builds_step_engines(
    families: Callable[[str], Tiny], tmp_path: Path, step: Literal["guided", "unguided"], timesteps: tuple[float, ...]
) -> None:
    import tensorrt_rtx as trt  # noqa: PLC0415 — heavy

    bundle, _ = families("unet")
    path = bundle / "unet" / "model.onnx"
    graph = composed(path, Variant(step=step, timesteps=timesteps), "unet")
    file = write_graph(graph, tmp_path, path.parent)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(file)), parser.get_error(0)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    inputs = [spec(value, "unet") for value in graph.graph.input]
    assert network.num_inputs == len(inputs)
    sizes = {"batch": 1, "2*batch": 2, "sequence": 12, "height": 8, "width": 8}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        shape = [sizes[name] if size == -1 else size for name, size in zip(names, tensor.shape, strict=True)]
        profile.set_shape(tensor.name, shape, shape, shape)
        # Its buffer is on the GPU then, as the runtime's are.
        assert not tensor.is_shape_tensor
    config.add_optimization_profile(profile)
    types = {network.get_input(index).name: trt.nptype(network.get_input(index).dtype) for index in range(len(inputs))}
    assert types == {one.name: np.dtype(one.dtype) for one in inputs}
    assert builder.build_serialized_network(network, config).nbytes > 1000


def test_names_stay_and_weights_are_copied_unread(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    write_tiny_bundle(bundle)
    source = bundle / "unet"
    given = read_graph(source / "model.onnx")
    composed = step_graph(given, guided=True)
    assert [node for node in composed.graph.node if not node.name.startswith("step/")] == list(given.graph.node)
    weights = {tensor.name: tensor for tensor in composed.graph.initializer}
    assert all(weights[tensor.name] == tensor for tensor in given.graph.initializer)
    assert any(tensor.data_location == TensorProto.EXTERNAL for tensor in weights.values())
    whole = step_graph(denoiser("unet", seed=1, hidden=4)[0], guided=True)
    onnx.checker.check_model(whole, full_check=True)
    written = write_graph(composed, tmp_path / "step", source)
    assert (written.parent / "model.onnx.data").read_bytes() == (source / "model.onnx.data").read_bytes()
    assert (source / "model.onnx.data").stat().st_nlink == 1  # a second name would make the bundle refused


def test_a_prediction_that_is_not_finite_names_row_and_model(families: Callable[[str], Tiny], tmp_path: Path) -> None:
    bundle, manifest = families("unet")
    plan = compile_plan(manifest, Schedule(steps=2, guidance_scale=4.0))
    given = conditioning(manifest, plan)
    given["unet"].conditional["encoder_hidden_states"][0, 0, 0] = np.nan  # type: ignore[index]
    walk = Walk(plan, given, latent_shape(manifest, plan))
    with pytest.raises(ExecutionError, match=r"step 0 .*unet\): NaN or Inf in the prediction, got '512 of 512"):
        walk.end(walk.fused(engines(tmp_path, bundle, plan, on_onnxruntime)))


def test_what_is_no_denoiser_is_refused(families: Callable[[str], Tiny]) -> None:
    bundle, _ = families("unet")
    for name in ("text_encoder", "vae_decoder"):
        with pytest.raises(ArgumentError, match=rf"{name}: no denoiser, and nothing else becomes a step engine, got"):
            step_graph(read_graph(bundle / name / "model.onnx"), guided=True, where=name)
    composed = step_graph(read_graph(bundle / "unet" / "model.onnx"), guided=True)
    with pytest.raises(ArgumentError, match="no denoiser"):
        step_graph(composed, guided=True)
    with pytest.raises(ArgumentError, match="history of a step engine, got -1"):
        step_graph(composed, guided=True, history=-1)


def test_graphs_that_cannot_be_composed_say_why() -> None:
    model, _ = denoiser("unet", seed=1, hidden=4)
    fixed, old, taken, wide = (onnx.ModelProto.FromString(model.SerializeToString()) for _ in range(4))
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    old.opset_import[0].version = 11
    taken.graph.node.append(helper.make_node("Identity", ["timestep"], ["noise"]))
    wide.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    for graph, message in (
        (fixed, "batch of both branches, got 3, expected an even number"),
        (old, "opset, got 11, expected 13 or newer"),
        (taken, "names a step engine's own tensors have, got 'noise'"),
        (wide, "channels predicted, got 8, expected at most 4"),
    ):
        with pytest.raises(BundleError, match=message):
            step_graph(graph, guided=True)


def test_a_file_that_is_no_graph_and_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="not an ONNX model"):
        read_graph(path)
    write_tiny_bundle(tmp_path / "bundle")
    graph = read_graph(tmp_path / "bundle" / "unet" / "model.onnx")
    with pytest.raises(BundleError, match=r"weights that a graph names, got 'model.onnx.data'"):
        write_graph(graph, tmp_path / "step", tmp_path)
