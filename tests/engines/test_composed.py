"""Engines of composed graphs: step engines and LoRA slots build on every backend, and are found as what they are."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.composed import composed
from tandemrt.engines.graph_files import write_graph
from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import PROOF_NAME
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.errors import ArgumentError, EngineError
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import Variant

TARGETS = ["onnxruntime:cpu", "openvino:cpu", "tensorrt-rtx:sm89"]
Plan = Callable[..., BuildPlan]


@pytest.fixture
def plan(tiny: Bundle, tmp_path: Path) -> Plan:
    """The plan of the tiny denoiser's engines for a target and profiles."""

    def plan(target: str, *profiles: str, **options: Any) -> BuildPlan:
        parsed = tuple(map(parse_profile, profiles))
        return BuildPlan(tiny.path, (parse_target(target),), tmp_path, ("unet",), parsed, **options)

    return plan


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({"step": True}, Variant(step="guided")),
        ({"step": True, "fold_steps": 2}, Variant(step="guided", timesteps=(999.0, 500.0))),
        ({"lora_slots": 2, "lora_rank": 4}, Variant(lora_slots=2, lora_rank=4)),
        ({"lora_slots": 1, "lora_rank": 4, "step": True}, Variant(lora_slots=1, lora_rank=4, step="guided")),
    ],
)
def test_what_was_composed_is_built_and_found(
    target: str, options: dict[str, Any], variant: Variant, tiny: Bundle, plan: Plan, tmp_path: Path
) -> None:
    wanted = requests_of(plan(target, "64..96:b1..2", **options), tiny)
    request = next(one for one in wanted if one.ingredients.variant == variant)
    outcome = ensure_engine(request, tmp_path, lambda label, done, total: None, {})
    there = {path.name for path in outcome.folder.iterdir()}
    assert there - {PROOF_NAME} == {"engine.json", "layers.json", *outcome.engine.files}
    feeds = feeds_of(request, batch=1 if variant.step else 2)
    shapes = {name: array.shape for name, array in feeds.items()}
    found = fitting_engines(tiny, "unet", parse_target(target), shapes, cache=tmp_path, variant=variant)[0]
    assert found.folder == outcome.folder
    assert not ensure_engine(request, tmp_path, lambda label, done, total: None, {}).built
    with pytest.raises(EngineError, match="there is no engine"):
        fitting_engines(tiny, "unet", parse_target(target), cache=tmp_path)
    if target == "tensorrt-rtx:sm89":
        assert found.engine.ingredients.profiles[0]["encoder_hidden_states"].max == (4, 12, 8)
        return
    model = tiny.model_path("unet")
    written = write_graph(composed(model, variant, "unet"), tmp_path / "graph", model.parent)
    expected = onnxruntime.InferenceSession(written).run(None, feeds)
    if target == "onnxruntime:cpu":
        made = onnxruntime.InferenceSession(found.folder / "model.onnx").run(None, feeds)
    else:
        blob = BytesIO((found.folder / "engine.blob").read_bytes())
        compiled = openvino.Core().import_model(blob, "CPU", found.engine.ingredients.flags)
        results = compiled(feeds)
        made = [results[compiled.output(spec.name)] for spec in found.engine.outputs]
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def feeds_of(request: Request, batch: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs for so many pictures, or rows, of 64x64 pixels."""
    random = np.random.default_rng(5)
    ranges = request.ingredients.profiles[0] if request.ingredients.profiles else None
    sizes = {"batch": batch, "height": 8, "width": 8, "sequence": 12, "steps": 2, "2*batch": 2 * batch}
    feeds = {}
    for spec in request.facts.inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        assert ranges is None or ranges[spec.name].holds(shape)
        feeds[spec.name] = (
            np.zeros(shape, spec.dtype) if spec.dtype == "int64" else random.standard_normal(shape).astype(spec.dtype)
        )
    return feeds


def test_profiles_say_which_branches_step_engines_run(tiny: Bundle, plan: Plan) -> None:
    wanted = plan("openvino:cpu", "64", "a=64:unguided", "b=96:guided", step=True)
    made = [(one.ingredients.variant.step, one.profile_names) for one in requests_of(wanted, tiny)]
    assert made == [("guided", ("64",)), ("guided", ("b",)), ("unguided", ("a",))]


def test_what_no_graph_can_be_made_of_is_refused(tiny: Bundle, plan: Plan, tmp_path: Path) -> None:
    for option in ({"step": True}, {"stages": 2}, {"lora_slots": 1, "lora_rank": 4}):
        decoder = BuildPlan(tiny.path, (parse_target("openvino:cpu"),), tmp_path, ("vae_decoder",), **option)
        with pytest.raises(ArgumentError, match="nothing to make it of, got 'vae_decoder', expected a denoiser"):
            requests_of(decoder, tiny)
    with pytest.raises(ArgumentError, match="--fold-steps: given without --step"):
        plan("openvino:cpu", fold_steps=2)
    with pytest.raises(ArgumentError, match="not both from 1 on"):
        plan("openvino:cpu", lora_slots=2)
    with pytest.raises(ArgumentError, match=r"--lora-rank: out of range, got 2000, expected a number in 1\.\.1024"):
        plan("openvino:cpu", lora_slots=2, lora_rank=2000)
