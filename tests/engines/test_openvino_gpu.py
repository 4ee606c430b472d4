"""OpenVINO's GPU, by a stand-in that computes on the CPU: what it is told, what its engines are bound to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from tandemrt.engines import openvino as builder
from tandemrt.engines.job import Job
from tandemrt.engines.plan import Request
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import open_engine, open_session
from tandemrt.runtime.backends import openvino as backend
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import FORMAT, Engine
from tandemrt.runtime.engine_search import Found
from tandemrt.runtime.errors import TargetError
from tandemrt.runtime.targets import Target, probe_backends

from .conftest import Requests
from .test_build import FEEDS, reference

NAME = "Intel(R) Arc(TM) A770 Graphics (dGPU)"
REAL = openvino.Core
TARGET = Target("openvino", "gpu", "fp32")


class Compiled:
    """A model compiled for the CPU that says it were on the GPU."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def get_property(self, name: str) -> Any:
        return ["GPU.0"] if name == "EXECUTION_DEVICES" else self._compiled.get_property(name)


class Core:
    """OpenVINO's, with a GPU; it refuses settings that a GPU has not, and keeps those it is given."""

    told: dict[str, str]
    name = NAME

    def __init__(self) -> None:
        self._core = REAL()
        self.available_devices = ["CPU", "GPU.0", "GPU.1"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def get_property(self, device: str, name: str) -> Any:
        if (device, name) == ("GPU", "FULL_DEVICE_NAME"):
            return self.name
        return ["FP32", "FP16"] if device == "GPU" else self._core.get_property(device, name)

    def compile_model(self, graph: Any, device: str, settings: Any) -> Compiled:
        return Compiled(self._core.compile_model(graph, self._cpu(device), self._kept(settings)))

    def import_model(self, blob: Any, device: str, settings: Any) -> Compiled:
        return Compiled(self._core.import_model(blob, self._cpu(device), self._kept(settings)))

    def _cpu(self, device: str) -> str:
        assert device == "GPU"
        return "CPU"

    def _kept(self, settings: Any) -> Any:
        assert not {"ENABLE_CPU_PINNING", "INFERENCE_NUM_THREADS"} & set(settings)
        Core.told = dict(settings)
        return settings


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(openvino, "Core", Core)
    backend.device_name.cache_clear()
    yield
    backend.device_name.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_engines_are_bound_to_the_gpu_by_its_name(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    (request,) = requests("openvino:gpu", components=("unet",))
    assert request.ingredients.architecture.endswith(f" {NAME}")
    monkeypatch.setattr(Core, "name", "Intel(R) Iris(R) Xe Graphics (iGPU)")
    backend.device_name.cache_clear()
    (elsewhere,) = requests("openvino:gpu", components=("unet",))
    assert elsewhere.key != request.key
    with pytest.raises(TargetError, match="this device has no instructions for the precision"):
        requests("openvino:gpu:bf16", components=("unet",))


@pytest.mark.usefixtures("gpu")
def test_what_was_built_for_a_gpu_runs_there(tiny: Bundle, requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:gpu", components=("unet",), profiles=("64:guided",))
    built = builder.build(job(request, tmp_path), lambda *_: None)
    facts = request.facts
    engine = Engine(
        format=FORMAT, component="unet", ingredients=request.ingredients, files=dict.fromkeys(built.files),
        inputs=facts.inputs, outputs=facts.outputs, profile_names=("64:guided",), build_s=1.0, peak_memory_bytes=1,
        versions={},
    )  # fmt: skip
    of_engine = open_engine(Found(tmp_path, engine, 0, 0), TARGET, threads=1)
    for session in (of_engine, open_session(tiny.model_path("unet"), TARGET, threads=1)):
        binding = session.bind({name: array.shape for name, array in FEEDS.items()})
        for name, array in FEEDS.items():
            binding.inputs[name][...] = array
        binding.run()
        np.testing.assert_allclose(binding.outputs["out_sample"], reference(tiny), atol=1e-5)
    assert Core.told == {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1"}


@pytest.mark.usefixtures("gpu")
def test_a_pipeline_opens_on_it_and_doctor_lists_it(tiny_path: Path) -> None:
    with Pipeline.open(tiny_path, target="openvino:gpu", threads=1) as pipe:
        (picture,) = pipe("red", num_inference_steps=2, seed=1, output_type="np").images
    assert np.isfinite(picture).all()
    assert Target("openvino", "gpu") in probe_backends()[1].targets
    assert backend.precision_hint("gpu", "fp16") == "f16"
    assert backend.precision_hint("cpu", "fp16") == "f32"


def job(request: Request, folder: Path) -> Job:
    made_of = request.ingredients
    return Job(
        component=request.component, model=str(request.model), folder=str(folder), backend=made_of.backend,
        device=made_of.device, precision=made_of.precision, profiles=made_of.profiles, flags=made_of.flags,
    )  # fmt: skip
