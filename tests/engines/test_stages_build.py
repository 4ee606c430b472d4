"""Engines of stages: built for every backend, found by their place, and together the whole denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.graph_files import read_graph
from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.engines.stages import stage_graphs
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.engine_session import Loader
from tandemrt.runtime.errors import ArgumentError, EngineError
from tandemrt.runtime.shapes import evaluated
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import PLAIN, UPDATE, Variant

from .test_stages import Arrays

SIZES = {"batch": 2, "height": 8, "width": 12, "sequence": 24, "steps": 2}


def requests(bundle: Path, cache: Path, target: str, *profiles: str, stages: int = 2) -> tuple[Request, ...]:
    parsed = tuple(map(parse_profile, profiles))
    plan = BuildPlan(bundle, (parse_target(target),), cache, ("unet",), parsed, stages=stages)
    return requests_of(plan, Bundle.open(bundle))


def built(wanted: Sequence[Request], cache: Path) -> None:
    for request in wanted:
        ensure_engine(request, cache, lambda label, done, total: None, {})


def random_inputs(shapes_bundle: Path) -> Arrays:
    random = np.random.default_rng(7)
    inputs = Bundle.open(shapes_bundle).component("unet").inputs
    return {one.name: random.standard_normal(evaluated(one.shape, SIZES)).astype(one.dtype) for one in inputs}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_stages_built_together_are_the_whole_denoiser(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    built(requests(shapes_bundle, tmp_path, target, "96x64:b1:guided"), tmp_path)
    bundle, asked, values = Bundle.open(shapes_bundle), parse_target(target), random_inputs(shapes_bundle)
    with_whole = open_session(bundle.model_path("unet"), asked.of_component(bundle.component("unet")), threads=1)
    for name in (None, (0, 2), (1, 2)):
        session = with_whole if name is None else Loader(bundle, "unet", asked, 1).session(Variant(stage=name))
        binding = session.bind({one.name: values[one.name].shape for one in session.inputs})
        for one in session.inputs:
            binding.inputs[one.name][...] = values[one.name]
        binding.run()
        made = {one.name: binding.outputs[one.name].copy() for one in session.outputs}
        values |= {"whole": made["out_sample"]} if name is None else made
        session.close()
    difference = np.abs(values["out_sample"] - values["whole"]).max()
    assert difference <= (1e-5 if target == "onnxruntime:cpu" else 1e-3) * np.abs(values["whole"]).max()
    with pytest.raises(EngineError, match=r"there is no engine for .* \(stage 1 of 3\).*build-engine .* --stages 3"):
        fitting_engines(bundle, "unet", asked, cache=tmp_path, variant=Variant(stage=(0, 3)))
    with pytest.raises(EngineError, match="there is no engine"):
        fitting_engines(bundle, "unet", asked, cache=tmp_path)


@pytest.mark.slow
def test_stages_build_for_gpus(shapes_bundle: Path, tmp_path: Path) -> None:
    whole, *wanted, update = requests(shapes_bundle, tmp_path, "tensorrt-rtx:sm89", "64..96:b1..2")
    assert [one.ingredients.variant for one in (whole, update)] == [PLAIN, UPDATE]
    built(wanted, tmp_path)
    bundle, target = Bundle.open(shapes_bundle), parse_target("tensorrt-rtx:sm89")
    for index, request in enumerate(wanted):
        shapes = {one.name: evaluated(one.shape, SIZES) for one in request.facts.inputs}
        variant = Variant(stage=(index, 2))
        found = fitting_engines(bundle, "unet", target, shapes, cache=tmp_path, variant=variant)[0]
        assert found.engine.inputs == request.facts.inputs


def test_every_stage_of_every_denoiser_is_wanted_with_its_ranges(shapes_bundle: Path, tmp_path: Path) -> None:
    profiles = "64..96:b1..2:opt=64:b1", "large=128:guided"
    _, *wanted, _ = requests(shapes_bundle, tmp_path, "tensorrt-rtx:sm89", *profiles, stages=3)
    assert [one.ingredients.variant.stage for one in wanted] == [(0, 3), (1, 3), (2, 3)]
    assert [str(one.ingredients.variant) for one in wanted] == [f"stage {index} of 3" for index in (1, 2, 3)]
    assert len({one.ingredients.variant.cuts for one in wanted}) == 1
    assert len({one.key for one in wanted}) == 3
    for request in wanted[1:]:
        taken = [one for one in request.facts.inputs if one.name.startswith("stage/")]
        assert taken
        varied, fixed = request.ingredients.profiles
        for one in taken:
            sides = [{"batch": batch, "height": side, "width": side, "sequence": 24}
                     for batch, side in ((1, 8), (2, 8), (4, 12), (2, 16))]  # fmt: skip
            low, best, high, guided = (evaluated(one.shape, sizes) for sizes in sides)
            assert (varied[one.name].min, varied[one.name].opt, varied[one.name].max) == (low, best, high)
            assert fixed[one.name].min == fixed[one.name].max == guided


@pytest.mark.parametrize(
    ("target", "slots", "unet"),
    [
        ("onnxruntime:cpu", 0, ["stage 1 of 2", "stage 2 of 2"]),
        ("tensorrt-rtx:sm89", 0, ["plain", "stage 1 of 2", "stage 2 of 2", "update"]),
        ("tensorrt-rtx:sm89", 1, [f"1 LoRA slot of rank 4{stage}" for stage in ("", ", stage 1 of 2", ", stage 2 of 2")]
        + ["update"]),
    ],
)  # fmt: skip
def test_all_that_a_window_needs_is_built_at_once(
    shapes_bundle: Path, tmp_path: Path, target: str, slots: int, unet: list[str]
) -> None:
    """Where no graph runs the rows outside it, the whole denoiser too; a bundle's other models are whole."""
    components, lora = ("unet", "vae_decoder"), {"lora_slots": slots, "lora_rank": 4 * slots}
    plan = BuildPlan(shapes_bundle, (parse_target(target),), tmp_path, components, stages=2, **lora)
    made = [(one.component, str(one.ingredients.variant)) for one in requests_of(plan, Bundle.open(shapes_bundle))]
    assert made == [*(("unet", variant) for variant in unet), ("vae_decoder", "plain")]


def test_stages_of_one_cut_serve_each_other_alone(shapes_bundle: Path, tmp_path: Path) -> None:
    (variant, _) = (one.ingredients.variant for one in requests(shapes_bundle, tmp_path, "onnxruntime:cpu"))
    (cut,) = variant.cuts
    assert variant.serves(Variant(stage=(0, 2)))
    assert variant.serves(Variant(stage=(0, 2), cuts=(cut,)))
    assert not variant.serves(Variant(stage=(0, 2), cuts=("mid_block.resnets.0",)))
    assert not variant.serves(Variant(stage=(1, 2)))
    assert not variant.serves(Variant())
    assert not Variant().serves(variant)
    model = read_graph(shapes_bundle / "unet" / "model.onnx")
    assert stage_graphs(model, at=(cut,))[1].stage.begins == cut


def test_what_is_no_number_of_stages_is_refused(shapes_bundle: Path, tiny_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"--stages: out of range, got 5, expected a number in 2\.\.4"):
        BuildPlan(shapes_bundle, (parse_target("onnxruntime:cpu"),), tmp_path, stages=5)
    with pytest.raises(ArgumentError, match="--stages: given together with --step"):
        BuildPlan(shapes_bundle, (parse_target("onnxruntime:cpu"),), tmp_path, stages=2, step=True)
    with pytest.raises(ArgumentError, match="unet: no denoiser whose blocks are told by its nodes' names"):
        requests(tiny_path, tmp_path, "onnxruntime:cpu")
