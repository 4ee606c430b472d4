"""Built engines under the runtime: a pipeline takes those that fit, and says what is wrong where it must have one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest

from tandemrt.engines.build import ensure_engine
from tandemrt.runtime import ExecutionError, Pipeline, auto_placement, engine_session
from tandemrt.runtime.backends import onnxruntime as ort_backend
from tandemrt.runtime.backends import openvino as openvino_backend
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import SIDECAR_NAME, read_sidecar
from tandemrt.runtime.engine_search import has_engine, profile_for
from tandemrt.runtime.engine_session import EngineSession, Loader
from tandemrt.runtime.errors import BundleError, EngineError
from tandemrt.runtime.files import file_sha256
from tandemrt.runtime.manifest import FileRecord
from tandemrt.runtime.onnx_files import projections
from tandemrt.runtime.ran_on import GRAPH, RanOn
from tandemrt.runtime.targets import Target, parse_target
from tandemrt.runtime.trace import Trace

from ..runtime.lora_writing import write_lora
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
    session = Loader(tiny, "unet", target, 1).session()
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
    whole = ran(Loader(tiny, "unet", Target("openvino", "cpu", "fp32"), 1).session(), SHAPES)
    blob = folder / "engine.blob"
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    loads.clear()
    again = ran(Loader(tiny, "unet", Target("openvino", "cpu", "fp32"), 1).session(), SHAPES)
    assert loads == ["graph"]
    np.testing.assert_allclose(again, whole, atol=1e-5)


def ran_on(bundle: Path, target: str, **arguments: Any) -> Mapping[str, tuple[RanOn, ...]]:
    with Pipeline.open(bundle, target=target, threads=1) as pipeline:
        return pipeline("red blue", seed=7, num_inference_steps=1, **arguments).timings.ran_on


def cut(folder: Path) -> None:
    (name,) = (path for path in folder.iterdir() if path.name in ("engine.blob", "model.onnx"))
    os.truncate(name, name.stat().st_size - 1)


def spoil(folder: Path) -> None:
    """Another file than was built, and a sidecar that knows no better."""
    engine = read_sidecar(folder)
    name = "engine.blob" if "engine.blob" in engine.files else "model.onnx"
    (folder / name).write_bytes(b"nothing to run")
    files = {**engine.files, name: FileRecord(size=14, sha256=file_sha256(folder / name))}
    (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(engine, files=files)))


def forget(folder: Path) -> None:
    (folder / SIDECAR_NAME).write_bytes(b"{")


def in_bfloat16(folder: Path) -> str:
    """Let an engine be one that computes in bf16; its key then."""
    engine = read_sidecar(folder)
    other = msgspec.structs.replace(engine, ingredients=msgspec.structs.replace(engine.ingredients, precision="bf16"))
    (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(other))
    return folder.rename(folder.with_name(other.ingredients.key)).name


@pytest.mark.parametrize("target", ["openvino:cpu:fp32", "onnxruntime:cpu"])
def test_an_engine_that_does_not_run_is_told(target: str, tiny_path: Path, requests: Requests, cache: Path) -> None:
    nothing = ran_on(tiny_path, target)
    assert set(nothing) == {"text_encoder", "unet", "vae_decoder"}
    assert set(nothing.values()) == {(GRAPH,)}
    (request,) = requests(target, components=("unet",), profiles=("64",))
    folder = ensure_engine(request, cache, silent, VERSIONS).folder
    assert ran_on(tiny_path, target) == {**nothing, "unet": (RanOn(folder.name, "plain"),)}
    asked = f"{target.removesuffix(':fp32')}:fp32 --component unet --profile 64x64:b1 --cache {cache}"
    command = f"`tandemrt build-engine {tiny_path} --target {asked}`"
    for harm, told in (
        (cut, rf"{folder}/.*: size, got .*, expected [0-9]+ bytes\. Build the engine again with {command}\.$"),
        (spoil, rf"^unet: .* cannot load the engine .*{folder.name}.* Remove its folder, .* with {command}\.$"),
        (forget, rf"^no engine for .* fits: .*engine\.json: not an engine's sidecar.*\. Run {command}\.$"),
    ):
        harm(folder)
        ran = ran_on(tiny_path, target)
        ((graph,),) = {ran["unet"]}
        assert (graph.engine, len(graph.refused)) == (None, 1)
        assert re.search(told, graph.refused[0])


def test_each_pipeline_has_the_cache_it_was_opened_with(
    tiny_path: Path, requests: Requests, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, arguments = "openvino:cpu:fp32", {"seed": 7, "num_inference_steps": 1}
    (request,) = requests(target, components=("unet",), profiles=("64:guided",))
    key = ensure_engine(request, cache / "own", silent, VERSIONS).folder.name
    with (
        Pipeline.open(tiny_path, target, threads=1, cache=cache / "own") as own,
        Pipeline.open(tiny_path, target, threads=1) as other,
    ):
        monkeypatch.setenv("TANDEMRT_CACHE", str(cache / "own"))
        assert own("red blue", **arguments).timings.ran_on["unet"] == (RanOn(key, "plain"),)
        assert other("red blue", placement="auto", **arguments).timings.ran_on["unet"] == (GRAPH,)
        lora = write_lora(cache / "lora.safetensors", {"unet": projections(tiny_path / "unet" / "model.onnx")}, rank=1)
        with pytest.raises(EngineError, match=rf"--cache {cache}`\.$"):
            other("red blue", loras={lora: 1.0}, **arguments)
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == ["own", "placements"]


def test_a_call_that_no_profile_takes_is_told(tiny_path: Path, requests: Requests, cache: Path) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",), profiles=("64:guided",))
    key = ensure_engine(request, cache, silent, VERSIONS).folder.name
    (graph,) = ran_on(tiny_path, "openvino:cpu:fp32", height=96, width=96)["unet"]
    assert graph.engine is None
    assert f"{key[:12]} has no profile for this call: sample (2, 4, 12, 12) is outside (2, 4, 8, 8)" in graph.refused[0]
    guided = {"guidance_interval": (0.0, 0.5)}
    with Pipeline.open(tiny_path, target="openvino:cpu:fp32", threads=1) as pipeline:
        both = pipeline("red blue", seed=7, num_inference_steps=2, **guided).timings.ran_on["unet"]
        again = pipeline("red blue", seed=7, num_inference_steps=1).timings.ran_on["unet"]
    assert [one.engine for one in both] == [key, None]
    assert "sample (1, 4, 8, 8) is outside" in both[1].refused[0]
    assert again == (RanOn(key, "plain"),)


def test_an_engine_in_another_precision_is_not_asked_for(tiny_path: Path, requests: Requests, cache: Path) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",))
    in_bfloat16(ensure_engine(request, cache, silent, VERSIONS).folder)
    assert ran_on(tiny_path, "openvino:cpu:fp32")["unet"] == (GRAPH,)


def test_a_damaged_engine_leaves_the_call_to_another_that_fits(
    tiny_path: Path, requests: Requests, cache: Path
) -> None:
    narrow, wide = requests("openvino:cpu:fp32", components=("unet",), profiles=("64:guided", "64..128"))
    cut(ensure_engine(narrow, cache, silent, VERSIONS).folder)
    key = ensure_engine(wide, cache, silent, VERSIONS).folder.name
    (ran,) = ran_on(tiny_path, "openvino:cpu:fp32")["unet"]
    assert ran.engine == key
    assert f"{narrow.key}/engine.blob: size" in ran.refused[0]
    assert " --component unet --profile 64x64:b1" in ran.refused[0]


def test_one_of_another_precision_is_not_spoken_of_beside_one_that_answers(
    tiny_path: Path, requests: Requests, cache: Path
) -> None:
    narrow, wide = requests("openvino:cpu:fp32", components=("unet",), profiles=("64:guided", "64..80"))
    key = ensure_engine(narrow, cache, silent, VERSIONS).folder.name
    other = in_bfloat16(ensure_engine(wide, cache, silent, VERSIONS).folder)
    (graph,) = ran_on(tiny_path, "openvino:cpu:fp32", height=96, width=96)["unet"]
    (told,) = graph.refused
    assert f"{key[:12]} has no profile for this call" in told
    assert other[:12] not in told


def test_an_engines_loading_is_on_the_timeline(
    tiny_path: Path, requests: Requests, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",))
    ensure_engine(request, cache, silent, VERSIONS)
    times: list[float] = []

    def timed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            times.append(time.perf_counter() * 1e6)
            return real(*arguments, **named)

        return call

    for name in ("check_engine_files", "open_engine"):
        monkeypatch.setattr(engine_session, name, timed(getattr(engine_session, name)))
    trace = Trace()
    with trace.recording():
        ran_on(tiny_path, "openvino:cpu:fp32")
    loads = {event["name"]: event for event in trace.events if event["cat"] == "load"}
    assert sorted(loads) == ["load text_encoder", "load unet", "load vae_decoder"]
    began = loads["load unet"]["ts"]
    assert len(times) == 2
    assert began <= times[0] <= times[1] <= began + loads["load unet"]["dur"]


def test_generate_says_what_ran(
    tiny_path: Path, requests: Requests, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = "onnxruntime:cpu"
    (request,) = requests(target, components=("unet",))
    folder = ensure_engine(request, cache, silent, VERSIONS).folder
    arguments = ["generate", str(tiny_path), "--prompt", "red", "--prompt", "blue", "--num-inference-steps", "1"]
    arguments += ["--target", target, "--output-dir", str(cache / "out"), "--force", "--seed", "7"]
    assert main(arguments) == 0
    told = f"ran text_encoder on graph; unet on engine {folder.name[:12]}; vae_decoder on graph\n"
    stderr = capsys.readouterr().err
    assert stderr.count(told) == 1
    assert "warning" not in stderr
    cut(folder)
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.count("ran text_encoder on graph; unet on graph; vae_decoder on graph\n") == 1
    assert err.count(f"warning: unet ran on graph: {folder}") == 1
    for image in json.loads(out)["images"]:
        assert image["ran_on"]["text_encoder"] == [
            {"engine": None, "variant": "", "refused": [], "gpu": None, "unasked": ""}
        ]
        assert "model.onnx: size" in image["ran_on"]["unet"][0]["refused"][0]
    (command,) = re.findall(r"`tandemrt (build-engine .*)`", err)
    assert main(shlex.split(command)) == 0  # and that helps
    capsys.readouterr()
    assert main(arguments) == 0
    assert told in (stderr := capsys.readouterr().err)
    assert "warning" not in stderr


def test_without_engines_the_graph_itself_is_run(tiny: Bundle, cache: Path) -> None:
    assert not has_engine(tiny, "unet", Target("openvino", "cpu", "fp32"))
    session = Loader(tiny, "unet", parse_target("onnxruntime:cpu"), None).session()
    assert isinstance(session, ort_backend.OnnxRuntimeSession)


def test_where_an_engine_is_a_must_its_absence_is_told(
    tiny: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_session, "target_here", lambda target: target)
    session = Loader(tiny, "unet", Target("tensorrt-rtx", "sm89", "fp32")).session()
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


def test_work_that_cannot_be_counted_loses_no_engine(
    tiny_path: Path,
    requests: Requests,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    untold = mock.Mock(side_effect=BundleError("unet", "the shape of 'x' cannot be told"))
    monkeypatch.setattr("tandemrt.engines.blocks.work_by_block", untold)
    (request,) = requests("onnxruntime:cpu", components=("unet",))
    engine = read_sidecar(ensure_engine(request, tmp_path, silent, VERSIONS).folder)
    assert (engine.multiply_adds, engine.multiply_adds_error) == ({}, "unet: the shape of 'x' cannot be told")
    assert main(["inspect", str(tiny_path), "--engines", "--cache", str(tmp_path)]) == 0
    assert "not counted: unet: the shape of 'x' cannot be told" in capsys.readouterr().out


def test_the_cache_is_left_as_it_was(tiny_path: Path, requests: Requests, cache: Path) -> None:
    (request,) = requests("openvino:cpu:fp32", components=("unet",))
    ensure_engine(request, cache, silent, VERSIONS)
    before = sorted(path.relative_to(cache) for path in cache.rglob("*"))
    painted(tiny_path, "openvino:cpu:fp32")
    assert sorted(path.relative_to(cache) for path in cache.rglob("*")) == before
    shutil.rmtree(engines_folder(cache))


def test_a_placement_is_measured_anew_on_new_engines(
    requests: Requests, cache: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, grounds = auto_placement._measured, 0

    def counted(*rest: Any) -> dict[str, float]:
        nonlocal grounds
        grounds += 1
        return measured(*rest)

    monkeypatch.setattr(auto_placement, "_measured", counted)
    arguments: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "placement": "auto"}

    def trials() -> int:
        with Pipeline.open(tiny_path, "onnxruntime:cpu", threads=2) as pipe:
            pipe("red", **arguments)
            assert bool(pipe._models.engines("unet")) == (grounds == 2)
        return grounds

    assert [trials(), trials()] == [1, 1]
    ensure_engine(*requests("onnxruntime:cpu", components=("unet",)), cache, silent, VERSIONS)
    assert [trials(), trials()] == [2, 2]
