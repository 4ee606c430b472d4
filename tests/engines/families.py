"""Whole families on every backend that builds here: each component is built, found, and gives its graph's numbers, and
the pipeline on them paints the picture of the graphs."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import openvino

from tandemrt.engines.build import Outcome, ensure_engine
from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.engines.profiles import default_profile, input_ranges
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.targets import Target, probe_backends
from tandemrt.runtime.variant import UPDATE

from ..interop.picture import psnr_db

TARGETS = (Target("onnxruntime", "cpu"), Target("openvino", "cpu"), Target("tensorrt-rtx", "portable"))
Arrays = dict[str, np.ndarray[Any, Any]]
MAX_RELATIVE_ERROR = 1e-3
# Of the picture to that of ONNX Runtime on the graphs, in fp32.
MINIMUM_PSNR_DB = {"onnxruntime:cpu": 60.0, "openvino:cpu": 60.0, "openvino:cpu:bf16": 35.0}


def require_engines(bundle: Bundle, cache: Path, components: tuple[str, ...] = ()) -> None:
    """Build components, all by default, for every backend and the default profile, and run what runs on a CPU."""
    plan = BuildPlan(bundle.path, TARGETS, cache, components)
    expected: dict[str, list[np.ndarray[Any, Any]]] = {}
    for request in requests_of(plan, bundle):
        if request.ingredients.variant == UPDATE:  # see test_update_engines.py
            continue
        feeds = random_inputs(request, bundle)
        shapes = {name: array.shape for name, array in feeds.items()}
        outcome = ensure_engine(request, cache, lambda label, done, total: None, {})
        found = fitting_engines(
            bundle, request.component, Target(request.target.backend, here(request)), shapes, cache=cache
        )[0]
        assert found.folder == outcome.folder
        if request.component not in expected:
            expected[request.component] = ran_by_onnxruntime(request.model, feeds)
        if request.target.backend == "onnxruntime":
            require_close(ran_by_onnxruntime(outcome.folder / "model.onnx", feeds), expected[request.component])
        elif request.target.backend == "openvino":
            require_close(ran_by_openvino(outcome, feeds), expected[request.component])
    with mock.patch.dict(os.environ, TANDEMRT_CACHE=str(cache)):
        require_pictures(bundle)


def here(request: Request) -> str:
    return "sm89" if request.target.device == "portable" else request.target.device


def require_pictures(bundle: Bundle) -> None:
    """Paint on every target that runs here, on its engines where there are any, and compare."""
    with mock.patch.dict(os.environ, TANDEMRT_CACHE=os.devnull):
        expected = painted(bundle, "onnxruntime:cpu")
    here = {str(target) for status in probe_backends() for target in status.targets}
    for target, minimum_db in MINIMUM_PSNR_DB.items():
        if target in here:
            assert psnr_db(painted(bundle, target), expected) >= minimum_db, target


def painted(bundle: Bundle, target: str) -> np.ndarray[Any, Any]:
    settings = {"num_inference_steps": 2, "seed": 7, "output_type": "np"}
    with Pipeline.open(bundle.path, target=target, threads=1) as pipeline:
        return np.stack(pipeline("a red circle", **settings).images).astype(np.float64)


def random_inputs(request: Request, bundle: Bundle) -> Arrays:
    """Inputs of the sizes that the default profile is tuned for: tokens are small numbers, the rest is normal."""
    ranges = input_ranges(request.component, request.facts, bundle.manifest, default_profile(bundle.manifest))
    random = np.random.default_rng(3)
    return {
        spec.name: random.integers(0, 40, ranges[spec.name].opt).astype(spec.dtype)
        if spec.dtype.startswith("int")
        else random.standard_normal(ranges[spec.name].opt).astype(spec.dtype)
        for spec in request.facts.inputs
    }


def ran_by_onnxruntime(model: Path, feeds: Arrays) -> list[np.ndarray[Any, Any]]:
    return list(onnxruntime.InferenceSession(model).run(None, feeds))


def ran_by_openvino(outcome: Outcome, feeds: Arrays) -> list[np.ndarray[Any, Any]]:
    blob = BytesIO((outcome.folder / "engine.blob").read_bytes())
    compiled = openvino.Core().import_model(blob, "CPU", outcome.engine.ingredients.flags)
    made = compiled(feeds)
    return [made[compiled.output(spec.name)] for spec in outcome.request.facts.outputs]


def require_close(actual: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert np.abs(one - other).max() <= MAX_RELATIVE_ERROR * np.abs(other).max()
