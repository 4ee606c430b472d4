"""Built engines under the runtime: a pipeline takes those that fit, and says what is wrong where it must have one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.engines.build import ensure_engine
from tandemrt.runtime import ExecutionError, Pipeline
from tandemrt.runtime.backends import onnxruntime as ort_backend
from tandemrt.runtime.backends import openvino as openvino_backend
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import engines_folder, read_sidecar
from tandemrt.runtime.engine_search import has_engine, profile_for
from tandemrt.runtime.engine_session import EngineSession, open_component
from tandemrt.runtime.errors import EngineError
from tandemrt.runtime.targets import Target, parse_target

from .conftest import Requests
from .test_build import VERSIONS, silent

SHAPES = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 12, 8)}
LARGER = {**SHAPES, "sample": (2, 4, 16, 16)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is loaded: the name of an engine's file, or `graph`."""
    listed: list[str] = []
    of_engine, of_graph = openvino_backend.OpenVinoSession.of_engine, openvino_backend.OpenVinoSession.of_graph

    def engine(found: Any, *rest: Any) -> Any:
        listed.append(next(iter(found.engine.files)))
        return of_engine(found, *rest)

    def graph(*arguments: Any) -> Any:
        listed.append("graph")
        return of_graph(*arguments)

    monkeypatch.setattr(openvino_backend.OpenVinoSession, "of_engine", engine)
    monkeypatch.setattr(openvino_backend.OpenVinoSession, "of_graph", graph)
    yield listed


def painted(bundle: Path, target: str, **arguments: Any) -> np.ndarray:
    with Pipeline.open(bundle, target=target, threads=1) as pipeline:
        return np.stack(
            pipeline("red blue", **{"seed": 7, "num_inference_steps": 3, "output_type": "np", **arguments}).images
        )


def ran(session: Any, shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    binding, random = session.bind(shapes), np.random.default_rng(0)
    for array in binding.inputs.values():
        array[...] = random.standard_normal(array.shape)
    binding.run()
    return binding.outputs["out_sample"].copy()


@pytest.mark.parametrize("target", ["openvino:cpu:fp32", "onnxruntime:cpu"])
def test_a_pipeline_paints_the_graphs_picture_on_engines(
    target: str, tiny_path: Path, requests: Requests, cache: Path
) -> None:
    expected = painted(tiny_path, target)
    for request in requests(target):
        ensure_engine(request, cache, silent, VERSIONS)
    np.testing.assert_allclose(painted(tiny_path, target), expected, atol=1e-5)


def test_engines_are_loaded_once_and_the_graph_for_what_they_do_not_take(
    tiny: Bundle, requests: Requests, cache: Path, loads: list[str]
) -> None:
    target = Target("openvino", "cpu", "fp32")
    (request,) = requests("openvino:cpu:fp32", components=("unet",), profiles=("64:guided",))
    ensure_engine(request, cache, silent, VERSIONS)
    session = open_component(tiny, "unet", target, threads=1)
    assert isinstance(session, EngineSession)
    for shapes, loaded in (
        (SHAPES, ["engine.blob"]),
        (SHAPES, ["engine.blob"]),
        (LARGER, ["engine.blob", "graph"]),
        (SHAPES, ["engine.blob", "graph"]),
    ):
        ran(session, shapes)
        assert loads == loaded
    session.close()
    with pytest.raises(ExecutionError, match="unet: the model is closed"):
        session.bind(SHAPES)


def test_a_damaged_engine_is_not_run(tiny: Bundle, requests: Requests, cache: Path, loads: list[str]) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",), profiles=("64:guided",))
    folder = ensure_engine(request, cache, silent, VERSIONS).folder
    whole = ran(open_component(tiny, "unet", Target("openvino", "cpu", "fp32"), threads=1), SHAPES)
    blob = folder / "engine.blob"
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    loads.clear()
    again = ran(open_component(tiny, "unet", Target("openvino", "cpu", "fp32"), threads=1), SHAPES)
    assert loads == ["graph"]
    np.testing.assert_allclose(again, whole, atol=1e-5)


def test_without_engines_the_graph_itself_is_run(tiny: Bundle, cache: Path) -> None:
    assert not has_engine(tiny, "unet", Target("openvino", "cpu", "fp32"))
    session = open_component(tiny, "unet", parse_target("onnxruntime:cpu"), threads=None)
    assert isinstance(session, ort_backend.OnnxRuntimeSession)


def test_where_an_engine_is_a_must_its_absence_is_told(tiny: Bundle, cache: Path) -> None:
    def load(_: object) -> Any:
        raise AssertionError("there is nothing to load")

    session = EngineSession(tiny, "unet", Target("tensorrt-rtx", "sm89", "fp32"), load)
    with pytest.raises(EngineError, match=r"unet: there is no engine for tensorrt-rtx:sm89:fp32 .*`tandemrt build-eng"):
        session.bind(SHAPES)
    with pytest.raises(ExecutionError, match="shape of input 'sample'"):
        session.bind({**SHAPES, "sample": (2, 3, 8, 8)})


def test_the_narrowest_profile_that_holds_the_shapes(requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("tensorrt-rtx:sm89", components=("unet",), profiles=("64..128", "64", "64:guided", "128"))
    engine = read_sidecar(ensure_engine(request, tmp_path, silent, VERSIONS).folder)
    single = {**SHAPES, "sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 12, 8)}
    names = [
        None if place is None else engine.profile_names[place]
        for place in (
            profile_for(engine, shapes) for shapes in (SHAPES, single, LARGER, {**SHAPES, "sample": (2, 4, 9, 8)})
        )
    ]
    assert names == ["64:guided", "64", "128", "64..128"]
    assert profile_for(engine, {**SHAPES, "sample": (2, 4, 7, 8)}) is None


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_an_engine_tells_its_graphs_work_by_block(target: str, requests: Requests, tmp_path: Path) -> None:
    (request,) = requests(target, components=("unet",), profiles=("128x64:guided",))
    engine = read_sidecar(ensure_engine(request, tmp_path, silent, VERSIONS).folder)
    pixels = 2 * 16 * 8
    assert engine.multiply_adds == {"matmul_1": 2 * 8 * 8, "conv_6": pixels * 8 * 4 * 9, "conv_9": pixels * 4 * 8}


def test_the_cache_is_left_as_it_was(tiny_path: Path, requests: Requests, cache: Path) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",))
    ensure_engine(request, cache, silent, VERSIONS)
    before = sorted(path.relative_to(cache) for path in cache.rglob("*"))
    painted(tiny_path, "openvino:cpu:fp32")
    assert sorted(path.relative_to(cache) for path in cache.rglob("*")) == before
    shutil.rmtree(engines_folder(cache))
