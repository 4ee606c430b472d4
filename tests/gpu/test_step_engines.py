"""Step engines on TensorRT's flavours: a call is a row, and the pictures are those of ONNX Runtime's plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tandemrt.engines.composed import composed
from tandemrt.engines.graph_files import write_graph
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.backends.tensorrt import TensorRtSession
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.targets import Target
from tandemrt.runtime.variant import Variant

from ..interop.picture import psnr_db
from .conftest import PROMPT, Build, Painted, device_of

pytestmark = pytest.mark.gpu

BOTH = ("64:b1-b2:guided", "64:b1-b2:unguided")
SIZES = {"batch": 1, "2*batch": 2, "steps": 2, "sequence": 24, "height": 8, "width": 8}


@pytest.mark.parametrize("fold_steps", [None, 8], ids=["plain", "folded"])
def test_pictures_equal_those_of_the_plain_loop(
    shapes_bundle: Path, name: str, build: Build, painted: Painted, fold_steps: int | None
) -> None:
    build(shapes_bundle, name, profiles=BOTH, step=True, fold_steps=fold_steps)
    hybrid: dict[str, Any] = {"steps": {"unet": 4, "unet_small": 4}, "num_inference_steps": None}
    with Pipeline.open(shapes_bundle, target=f"{name}:{device_of(name)}:fp32") as pipeline:
        for arguments in ({}, {}, {**hybrid, "guidance_interval": (0.0, 0.5)}, {"num_images_per_prompt": 2}):
            given = {"num_inference_steps": 8, "guidance_scale": 2.0, "seed": 7, **arguments}
            expected = painted(shapes_bundle, "onnxruntime:cpu:fp32", **given)
            out = pipeline(PROMPT, output_type="np", **given)
            assert out.timings.step_engines
            # All rows were one CUDA graph, whatever engines they ran on; looked at one by one they paint the same.
            assert {row.together for row in out.timings.rows} == {len(out.timings.rows)}
            apart = pipeline.stream(PROMPT, output_type="np", **given).result()
            np.testing.assert_array_equal(np.stack(apart.images), np.stack(out.images))
            assert psnr_db(np.stack([np.asarray(image) for image in out.images]), expected) >= 60.0


@pytest.mark.parametrize(
    "given", [{"placement": "sequential"}, {"placement": "parallel"}, {"guidance": "adaptive"}], ids=str
)
def test_update_engines_paint_the_pictures_of_the_plain_loop(
    shapes_bundle: Path, name: str, build: Build, painted: Painted, given: dict[str, Any]
) -> None:
    build(shapes_bundle, name)
    asked = {"num_inference_steps": 8, "guidance_scale": 2.0, "seed": 7, **given}
    expected = painted(shapes_bundle, "onnxruntime:cpu:fp32", **asked)
    with Pipeline.open(shapes_bundle, target=f"{name}:{device_of(name)}:fp32") as pipeline:
        for _ in range(2):
            out = pipeline(PROMPT, output_type="np", **asked)
            assert "update" in [one.variant for one in out.timings.ran_on["unet"]]
            assert psnr_db(np.stack([np.asarray(image) for image in out.images]), expected) >= 60.0


@pytest.mark.parametrize("timesteps", [(), (999.0, 500.0), (999.0,)], ids=["plain", "two folded", "one folded"])
def test_a_row_equals_that_of_onnxruntime(
    shapes_bundle: Path,
    name: str,
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    timesteps: tuple[float, ...],
) -> None:
    monkeypatch.setattr("tandemrt.engines.plan._timesteps", lambda *_: timesteps)
    bundle = build(shapes_bundle, name, "unet_small", profiles=("64:guided",), step=True)
    variant = Variant(step="guided", timesteps=timesteps)
    found = fitting_engines(bundle, "unet_small", Target(name, cuda.device().architecture), variant=variant)[0]
    session = TensorRtSession(found.folder, found.engine)
    shapes = {
        spec.name: tuple(SIZES[size] if isinstance(size, str) else size for size in spec.shape)
        for spec in session.inputs
    }
    binding, random = session.bind(shapes), np.random.default_rng(0)
    feeds = {
        spec.name: np.array(len(timesteps) - 1)
        if spec.dtype == "int64"
        else random.standard_normal(shapes[spec.name]).astype(spec.dtype)
        for spec in session.inputs
    }
    assert ("step_index" in feeds) == (len(timesteps) > 1)
    model = bundle.model_path("unet_small")
    written = write_graph(composed(model, variant, "unet_small", hands=True), tmp_path / "graph", model.parent)
    expected = onnxruntime.InferenceSession(written).run([spec.name for spec in session.outputs], feeds)
    # The second run is recorded as a CUDA graph, the third launches it.
    for _ in range(3):
        for one, values in feeds.items():
            binding.inputs[one][...] = values
        binding.run()
        for spec, values in zip(session.outputs, expected, strict=True):
            np.testing.assert_allclose(binding.outputs[spec.name], values, rtol=0, atol=1e-3)
