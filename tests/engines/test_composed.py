"""Engines of composed graphs: step engines build on every backend, and are found under their variant's name alone."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.composed import composed_requests
from tandemrt.engines.graph_files import read_graph
from tandemrt.engines.profiles import parse_profile
from tandemrt.engines.step import step_graph
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import find_engine
from tandemrt.runtime.errors import ArgumentError, EngineError
from tandemrt.runtime.targets import Target, parse_target

VARIANT = "step:history=1:guided"


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu", "tensorrt-rtx:sm89"])
def test_a_step_engine_is_built_and_found(target: str, tiny: Bundle, tmp_path: Path) -> None:
    graph = step_graph(read_graph(tiny.model_path("unet")), history=1, guided=True)
    profiles = (parse_profile("64..96:b1..2"),)
    with composed_requests(tiny, "unet", parse_target(target), profiles, (VARIANT, graph)) as (request,):
        key = request.key
        outcome = ensure_engine(request, tmp_path, lambda label, done, total: None, {})
        random = np.random.default_rng(5)
        shapes = {spec.name: SHAPES[spec.name] for spec in request.facts.inputs}
        feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        expected = onnxruntime.InferenceSession(request.model).run(None, feeds)
    with composed_requests(tiny, "unet", parse_target(target), profiles, (VARIANT, graph)) as (request,):
        assert request.key == key
    found = find_engine(tiny, "unet", parse_target(target), shapes, cache=tmp_path, variant=VARIANT)
    assert found.folder == outcome.folder
    with pytest.raises(EngineError, match="there is no engine"):
        find_engine(tiny, "unet", parse_target(target), cache=tmp_path)
    if target == "onnxruntime:cpu":
        made = onnxruntime.InferenceSession(found.folder / "model.onnx").run(None, feeds)
    elif target == "openvino:cpu":
        blob = BytesIO((found.folder / "engine.blob").read_bytes())
        compiled = openvino.Core().import_model(blob, "CPU", found.engine.ingredients.flags)
        results = compiled(feeds)
        made = [results[compiled.output(spec.name)] for spec in found.engine.outputs]
    else:
        assert found.engine.ingredients.profiles[0]["encoder_hidden_states"].max == (4, 12, 8)
        return
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# One picture, and its two branches in what the denoiser itself reads.
SHAPES = {
    "state": (2, 1, 4, 8, 8),
    "model_input": (2,),
    "update": (2, 4),
    "noise": (1, 4, 8, 8),
    "guidance_scale": (1,),
    "timestep": (1,),
    "encoder_hidden_states": (2, 12, 8),
}


def test_guidance_is_the_graphs_own_affair(tiny: Bundle) -> None:
    graph = step_graph(read_graph(tiny.model_path("unet")), history=0, guided=False)
    target, guided = Target("onnxruntime", "cpu"), (parse_profile("64:guided"),)
    with (
        pytest.raises(ArgumentError, match="guidance, got 'guided'"),
        composed_requests(tiny, "unet", target, guided, (VARIANT, graph)),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="got 'plain', expected another one"),
        composed_requests(tiny, "unet", target, (parse_profile("64"),), ("plain", graph)),
    ):
        pass
