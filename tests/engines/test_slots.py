"""LoRA slots: adapters come and go as inputs, and the base's bits are back when they are gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from tandemrt.engines.fold import folded
from tandemrt.engines.graph_files import read_graph, spec, write_graph
from tandemrt.engines.slots import lora_slots
from tandemrt.engines.step import step_graph
from tandemrt.runtime import manifest_files as manifests
from tandemrt.runtime.backends.base import Session
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.errors import ArgumentError, BundleError, RequestError
from tandemrt.runtime.lora_slots import (
    LORA_DOWN,
    LORA_SCALE,
    LORA_UP,
    Adapter,
    LowRank,
    module_of,
    slot_inputs,
    slot_widths,
)
from tandemrt.runtime.manifest import TensorSpec
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.step_sampler import StepEngine
from tandemrt.runtime.variant import PLAIN

from ..runtime.tiny_bundle import Graph as TinyGraph
from ..runtime.tiny_bundle import denoiser, described
from .loops import Open, Walk, conditioning, latent_shape, on_onnxruntime, on_openvino

SLOTS, RANK = 2, 4
Arrays = Mapping[str, npt.NDArray[Any]]


def given(session: Session) -> dict[str, npt.NDArray[Any]]:
    random, sizes = np.random.default_rng(0), {"batch": 2, "sequence": 12, "height": 16, "width": 16, "steps": 2}
    made = {}
    for one in session.inputs:
        shape = [sizes.get(str(size), size) for size in one.shape]
        whole = one.dtype == "int64"
        made[one.name] = random.integers(0, 90, shape) if whole else random.standard_normal(shape, np.float32)
    return made


def run(session: Session, inputs: Arrays) -> npt.NDArray[Any]:
    binding = session.bind({name: values.shape for name, values in inputs.items()})
    for name, values in inputs.items():
        binding.inputs[name][...] = values
    binding.run()
    return binding.outputs[session.outputs[0].name].copy()


def adapter(session: Session, seed: int, rank: int, scale: float) -> Adapter:
    """A change of every module that has slots."""
    random = np.random.default_rng(seed)
    changes = {
        module: LowRank(*(0.1 * random.standard_normal(shape, np.float32) for shape in ((rank, read), (made, rank))))
        for module, (read, made) in slot_widths(session.inputs).items()
    }
    return Adapter(f"adapter {seed}", changes, scale)


def fused(model: onnx.ModelProto, adapters: list[Adapter]) -> onnx.ModelProto:
    """The graph with the adapters' changes added to its weights."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    weights = {tensor.name: tensor for tensor in copy.graph.initializer}
    for node in copy.graph.node:
        module = module_of(node.name)
        tensor = weights.get(node.input[1]) if len(node.input) > 1 else None
        changes = [
            one.scale * one.changes[module].up @ one.changes[module].down for one in adapters if module in one.changes
        ]
        if changes and tensor is not None and node.op_type in ("MatMul", "Gemm", "Conv"):
            base = numpy_helper.to_array(tensor)
            change = sum(changes).T if node.op_type == "MatMul" else sum(changes)
            tensor.CopyFrom(
                numpy_helper.from_array((base + change.reshape(base.shape)).astype(np.float32), tensor.name)
            )
    return copy


@pytest.mark.parametrize("opened", [on_onnxruntime, on_openvino])
@pytest.mark.parametrize("name", ["unet_small", "text_encoder"])
def test_a_walk_over_adapters_ends_at_the_bases_bits(
    shapes_bundle: Path, tmp_path: Path, opened: Open, name: str
) -> None:
    source = shapes_bundle / name
    whole = read_graph(source / "model.onnx")
    base = opened(source / "model.onnx")
    slotted = opened(write_graph(lora_slots(whole, slots=SLOTS, rank=RANK), tmp_path / "slots", source))
    inputs = given(base)
    expected = run(base, inputs)
    one, two = adapter(slotted, 1, RANK, 1.0), adapter(slotted, 2, RANK - 1, 0.7)
    silent = [Adapter(each.name, each.changes, 0.0) for each in (one, two)]
    for wanted in ([], [one], [two], [one, two], silent, []):
        got = run(slotted, {**inputs, **slot_inputs(slotted.inputs, wanted)})
        if wanted in ([], silent):
            np.testing.assert_array_equal(got, expected)
            continue
        written = write_graph(fused(whole, wanted), tmp_path / "fused", source)
        reference, scale = run(opened(written), inputs), np.abs(got).max()
        assert np.abs(got - expected).max() > 0.01 * scale
        np.testing.assert_allclose(got, reference, rtol=0, atol=2e-5 * scale)
    swapped = run(slotted, {**inputs, **slot_inputs(slotted.inputs, [two, one])})
    both = run(slotted, {**inputs, **slot_inputs(slotted.inputs, [one, two])})
    np.testing.assert_allclose(swapped, both, rtol=0, atol=2e-5 * np.abs(both).max())


def test_folded_step_engines_have_slots(shapes_bundle: Path, tmp_path: Path) -> None:
    manifest = manifests.decode((shapes_bundle / "tandem.json").read_bytes(), "shapes")
    source, name = shapes_bundle / "unet_small", "unet_small"
    plan = compile_plan(manifest, Schedule(steps={name: 3}, solver="dpmsolver++", guidance_scale=2.0))
    slotted = lora_slots(read_graph(source / "model.onnx"), slots=SLOTS, rank=RANK)
    plain = on_onnxruntime(write_graph(slotted, tmp_path / "slots", source))
    one = adapter(plain, 1, RANK, 0.5)
    # A LoRA on the time embedding itself would keep it from being folded.
    timesteps = plan.table.timesteps.tolist()
    engine = on_onnxruntime(write_graph(step_graph(slotted, guided=True), tmp_path / "step", source))
    ended = {}
    for wanted in ((), (one,)):
        branches = conditioning(manifest, plan)[name]
        walk = Walk(
            plan,
            {name: Conditioning(branches.conditional, branches.unconditional, adapters=wanted)},
            latent_shape(manifest, plan),
        )
        expected, _ = walk.end(walk.unfused({name: plain}))
        got, _ = walk.end(walk.fused({(name, True): StepEngine(engine, PLAIN)}))
        np.testing.assert_array_equal(got.arrays, expected.arrays)
        ended[len(wanted)] = got.latents.copy()
    assert np.abs(ended[0] - ended[1]).max() > 0.01
    few = folded(slotted, timesteps, source)
    assert sum(node.op_type in ("Sin", "Cos") for node in few.graph.node) == 0


STRIDED = """
<ir_version: 10, opset_import: ["": 20]>
strided (float[batch, 3, height, width] x) => (float[batch, 4, h, w] y)
{
  y = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 1, 2], dilations = [1, 2]>(x, w, b)
}
"""


@pytest.mark.parametrize("opened", [on_onnxruntime, on_openvino])
def test_a_convolution_keeps_its_strides_pads_and_dilations(tmp_path: Path, opened: Open) -> None:
    random, graph = np.random.default_rng(5), onnx.parser.parse_model(STRIDED)
    for name, shape in (("w", (4, 3, 3, 3)), ("b", (4,))):
        graph.graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape, np.float32), name))
    graph.graph.node[0].name = "/down/conv/Conv"
    slotted = opened(write_graph(lora_slots(graph, slots=SLOTS, rank=RANK), tmp_path, tmp_path))
    assert {one.name: one.shape for one in slotted.inputs}[LORA_DOWN + "down.conv"] == (SLOTS * RANK, 3, 3, 3)
    x, one = random.standard_normal((2, 3, 9, 8), np.float32), adapter(slotted, 1, RANK - 1, 0.5)
    got = run(slotted, {"x": x, **slot_inputs(slotted.inputs, [one])})
    expected = run(opened(write_graph(fused(graph, [one]), tmp_path / "fused", tmp_path)), {"x": x})
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


TEXT = """
<ir_version: 10, opset_import: ["": 20]>
text (float[batch, 3] x) => (float[batch, 2] y)
{
  half = Cast<to: int = 10>(x)
  product = MatMul(half, w)
  sum = Add(product, b)
  y = Cast<to: int = 1>(sum)
}
"""


def test_half_precision_projections_take_half_precision_adapters(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(TEXT)
    for name, values in (("w", [[1, 2], [3, 4], [5, 6]]), ("b", [1, -1])):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(values, np.float16), name))
    graph.graph.node[1].name = "/text/proj/MatMul"
    slotted = lora_slots(graph, slots=1, rank=2)
    onnx.checker.check_model(slotted, full_check=True)
    session = on_onnxruntime(write_graph(slotted, tmp_path, tmp_path))
    types = {one.name: one.dtype for one in session.inputs}
    assert types == {
        "x": "float32",
        LORA_SCALE: "float32",
        LORA_DOWN + "text.proj": "float16",
        LORA_UP + "text.proj": "float16",
    }
    change = LowRank(np.array([[1, 0, 0]], np.float32), np.array([[0], [2]], np.float32))
    x = np.array([[1, 2, 3]], np.float32)
    inputs = slot_inputs(session.inputs, [Adapter("one", {"text.proj": change}, 0.5)])
    np.testing.assert_array_equal(run(session, {"x": x, **inputs}), [[23, 28]])


def test_what_does_not_fit_the_slots_is_refused(shapes_bundle: Path) -> None:
    slotted = lora_slots(read_graph(shapes_bundle / "unet_small" / "model.onnx"), slots=1, rank=2)
    inputs = tuple(spec(value, "test") for value in slotted.graph.input if value.name.startswith("lora_"))
    module, (read, made) = next(iter(slot_widths(inputs).items()))
    fits = LowRank(np.ones((2, read), np.float32), np.ones((made, 2), np.float32))
    wide = LowRank(np.ones((3, read), np.float32), np.ones((made, 3), np.float32))
    long = LowRank(np.ones((2, read + 1), np.float32), np.ones((made, 2), np.float32))
    for adapters, message in (
        ([Adapter("a", {module: fits})] * 2, r"loras: ranks of all together, got 4, expected at most 2\. Build"),
        ([Adapter("a", {module + "s": fits})], r"loras: a: .*: no module that has slots, expected one of \d+ modules"),
        ([Adapter("a", {module: wide})], r"ranks of all together, got 3, expected at most 2"),
        ([Adapter("a", {module: long})], r"shapes of down and up, got"),
        ([Adapter("a", {module: fits}, float("nan"))], r"loras: a: scale, got nan"),
    ):
        with pytest.raises(RequestError, match=message):
            slot_inputs(inputs, adapters)


def test_graphs_without_room_for_slots_are_refused() -> None:
    model, _ = denoiser("unet", seed=1, hidden=4)
    with pytest.raises(ArgumentError, match=r"LoRA slots and rank, got \(0, 4\)"):
        lora_slots(model, slots=0, rank=4)
    for node in model.graph.node:
        node.name = ""
    with pytest.raises(BundleError, match="two projections of one name"):
        lora_slots(model, slots=1, rank=4)
    graph = TinyGraph("bare", 0)
    graph.node("Tanh", ["x"], "y")
    specs = [TensorSpec(name=name, dtype="float32", shape=("batch", 4)) for name in "xy"]
    bare, _ = described(graph, (specs[0],), (specs[1],), role="denoiser")
    with pytest.raises(ArgumentError, match="no projection whose weight is stored"):
        lora_slots(bare, slots=1, rank=4)
