"""What TensorRT's flavours are told, by a stand-in for their module: options, flags, measured times, other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tandemrt.engines import flavour
from tandemrt.engines import tensorrt as builders
from tandemrt.engines.build import ensure_engine, timings_file
from tandemrt.engines.flavour import Options
from tandemrt.engines.graph_files import spec
from tandemrt.engines.job import Job
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.refit import BaseWeights, weight_changes
from tandemrt.engines.slots import lora_slots
from tandemrt.runtime import engine_search, targets
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.backends.refit import Refit
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import SIDECAR_NAME, read_sidecar
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.errors import ArgumentError, EngineError, ExecutionError, RequestError, TargetError
from tandemrt.runtime.lora_slots import Adapter, LowRank, slot_inputs
from tandemrt.runtime.targets import Target, parse_target

from .conftest import Requests
from .test_build import FEEDS, VERSIONS, left_in, silent


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "has_nvidia_driver", lambda: False)


class Config:
    """A builder's configuration that remembers what it is told."""

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.timings: Any = None
        self.clear_flag, self.set_flag = self.flags.discard, self.flags.add

    def create_timing_cache(self, known: bytes) -> Any:
        return None if known == b"of another GPU" else SimpleNamespace(known=known, serialize=lambda: known + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self.timings = cache


def stand_in(config: Config) -> Any:
    """A module with what the builder uses of TensorRT."""
    class_ = SimpleNamespace(__init__=lambda self: None)
    builder = SimpleNamespace(
        create_network=lambda flags: None,
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: b"plan",
    )
    names = ("TF32", "REFIT", "VERSION_COMPATIBLE")
    return SimpleNamespace(
        __version__="10.13.0",
        ILogger=type("ILogger", (), {"ERROR": 1, "WARNING": 2, "INFO": 3}),
        IProgressMonitor=type("IProgressMonitor", (), vars(class_)),
        Builder=lambda log: builder,
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        OnnxParser=lambda network, log: SimpleNamespace(parse_from_file=lambda path: True),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        BuilderFlag=SimpleNamespace(**{name: name for name in names}),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
    )


def built(folder: Path, device: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch, timings: Path) -> Config:
    config = Config()
    monkeypatch.setattr(builders, "imported", lambda backend: stand_in(config))
    job = Job(
        component="unet", model="x", folder=str(folder), backend="tensorrt", device=device, precision="fp16",
        profiles=(), flags=flags, timings=str(timings),
    )  # fmt: skip
    made = builders.build(job, silent)
    assert (made.files, (folder / "engine.plan").read_bytes()) == (("engine.plan",), b"plan")
    return config


def test_options_reach_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, device, told, hardware in (
        (Options(), "sm90", set(), None),
        (Options(refit=True), "sm90", {"REFIT"}, None),
        (Options(version_compatible=True), "sm90", {"VERSION_COMPATIBLE"}, None),
        (Options(), "portable", {"VERSION_COMPATIBLE"}, "ampere+"),
    ):
        config = built(tmp_path, device, options.flags("tensorrt", device), monkeypatch, tmp_path / "timings")
        assert (config.flags, getattr(config, "hardware_compatibility_level", None)) == (told, hardware)


def test_times_that_were_measured_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = tmp_path / "timings" / "tensorrt-10-sm90.bin"
    assert built(tmp_path, "sm90", {}, monkeypatch, timings).timings.known == b""
    assert built(tmp_path, "sm90", {}, monkeypatch, timings).timings.known == b"+"
    assert timings.read_bytes() == b"++"
    timings.write_bytes(b"of another GPU")
    assert built(tmp_path, "sm90", {}, monkeypatch, timings).timings.known == b""
    (tmp_path / "file").write_bytes(b"")
    built(tmp_path, "sm90", {}, monkeypatch, tmp_path / "file" / "timings")  # cannot be written, and that is all


def test_options_are_of_the_key(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "has_nvidia_driver", lambda: True)

    def ingredients(options: Options, target: str = "tensorrt-rtx:sm89") -> Any:
        plan = BuildPlan(tiny.path, (parse_target(target),), tmp_path, ("unet",), options=options)
        return requests_of(plan, tiny)[0].ingredients

    every = [Options(refit, compatible) for refit in (False, True) for compatible in (False, True)]
    assert len({ingredients(options).key for options in every}) == 4
    made_of = ingredients(Options(refit=True))
    assert made_of.flags == {"refit": True}
    assert timings_file(tmp_path, made_of).name == f"tensorrt-rtx-{made_of.backend_version}-sm89.bin"
    with pytest.raises(ArgumentError, match=r"--refit: not for this target, got 'openvino:cpu', expected targets of"):
        ingredients(Options(refit=True), "openvino:cpu")
    with pytest.raises(ArgumentError, match="--refit: not for precision bf16"):
        ingredients(Options(refit=True), "tensorrt-rtx:sm89:bf16")


def test_tensorrt_builds_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "imported", lambda backend: None)
    monkeypatch.setattr(flavour, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(cuda, "device", lambda: SimpleNamespace(architecture="sm90"))
    for device in ("sm90", "portable"):
        flavour.require_buildable("tensorrt", device)
    for device in ("sm89", "sm89+sm90"):
        with pytest.raises(TargetError, match=r"builds for the GPU that is here, got .*, expected sm90 or portable"):
            flavour.require_buildable("tensorrt", device)


@pytest.mark.parametrize("option", ["--refit", "--version-compatible"])
def test_what_needs_a_gpu_is_refused_before_the_build(
    option: str, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build-engine", str(tiny_path), "--target", "tensorrt-rtx:sm89", "--cache", str(tmp_path), option]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert f"{option} asks for an engine that its builder makes only where there is a GPU" in told
    assert ("--lora-slots" in told) == (option == "--refit")
    assert left_in(tmp_path) == []


def test_the_builder_does_fail_where_it_is_said_to(requests: Requests, tmp_path: Path) -> None:
    """Should a newer TensorRT-RTX build them without a GPU, the refusal above is to go."""
    if targets.nvidia_gpus():
        return
    (request,) = requests("tensorrt-rtx:sm89", components=("vae_decoder_tiny",))
    made_of = msgspec.structs.replace(request.ingredients, flags={"refit": True})
    with pytest.raises((EngineError, TargetError)):
        ensure_engine(replace(request, ingredients=made_of), tmp_path, silent, VERSIONS)


def test_engines_for_newer_versions_and_for_refits_are_found(
    tiny: Bundle, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (request,) = requests("tensorrt-rtx:sm89", components=("vae_decoder_tiny",))
    plain = ensure_engine(request, tmp_path, silent, VERSIONS)

    def resigned(**changes: Any) -> str:
        """A copy of the engine under another key."""
        made_of = msgspec.structs.replace(request.ingredients, **changes)
        folder = engines_folder(tmp_path) / made_of.key
        folder.mkdir()
        (folder / "engine.plan").write_bytes((plain.folder / "engine.plan").read_bytes())
        engine = msgspec.structs.replace(read_sidecar(plain.folder), ingredients=made_of)
        (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(engine))
        return made_of.key

    target = Target("tensorrt-rtx", "sm89")
    resigned(flags={"refit": True})
    assert fitting_engines(tiny, "vae_decoder_tiny", target, cache=tmp_path)[0].folder == plain.folder
    own = request.ingredients.backend_version
    major = int(own.split(".")[0])
    compatible = resigned(flags={"version_compatible": True})
    for version, found in ((f"{major}.999.0", True), (f"{major + 1}.0", False), (f"{major}.0.1", False)):
        monkeypatch.setattr(engine_search, "installed_version", lambda backend, version=version: version)
        if found:
            assert fitting_engines(tiny, "vae_decoder_tiny", target, cache=tmp_path)[0].folder.name == compatible
        else:
            with pytest.raises(EngineError, match=f"is of tensorrt-rtx {own}, here is {version}"):
                fitting_engines(tiny, "vae_decoder_tiny", target, cache=tmp_path)


class Refitter:
    """Stands for TensorRT's: `engine` is a dictionary of weights, of which `fused` are refitted together."""

    def __init__(self, engine: dict[str, Any], log: Any) -> None:
        self.engine, self.new = engine, dict[str, Any]()

    def get_all_weights(self) -> list[str]:
        return list(self.engine)

    def get_missing_weights(self) -> list[str]:
        return ["b"] if "a" in self.new and "b" not in self.new else []

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.new[name] = weights.copy()
        return bool(weights.shape == self.engine[name].shape)

    def refit_cuda_engine(self) -> bool:
        self.engine.update(self.new)
        return True


def test_weights_are_always_made_from_the_base() -> None:
    random = np.random.default_rng(0)
    base: Mapping[str, Any] = {name: random.standard_normal((3, 4)).astype(np.float16) for name in "abc"}
    engine = {name: array.copy() for name, array in base.items()}
    trt = SimpleNamespace(Refitter=Refitter, Weights=lambda array: array)
    refit = Refit(trt, SimpleNamespace(messages=["too large"]), "unet")
    change = random.standard_normal((3, 4)).astype(np.float32)
    for changes in ({"a": change}, {"c": change}, {"a": 2 * change, "c": -change}, {}, {"b": change}, {}):
        refit.apply(engine, base, changes)
        for name, array in base.items():
            added = changes.get(name, np.float32(0))
            np.testing.assert_array_equal(engine[name], (array.astype(np.float32) + added).astype(np.float16))
    with pytest.raises(EngineError, match=r"unet: weights to refit, got \['z'\]"):
        refit.apply(engine, base, {"z": change})
    with pytest.raises(ExecutionError, match=r"shape of the change of weight 'a', got \(4, 3\)"):
        refit.apply(engine, base, {"a": change.T})
    with pytest.raises(ExecutionError, match=r"weight 'c' of shape \(3, 4\) is refused \(too large\)"):
        refit.apply({**engine, "c": np.zeros(1)}, base, {"c": change})


def test_what_loras_add_equals_their_slots(tiny: Bundle, tmp_path: Path) -> None:
    path = tiny.model_path("unet")
    base, random = BaseWeights(path), np.random.default_rng(5)

    def adapter(name: str, scale: float, *modules: tuple[str, int, int]) -> Adapter:
        changes = {
            module: LowRank(
                random.standard_normal((2, read)).astype(np.float32),
                random.standard_normal((made, 2)).astype(np.float32),
            )
            for module, read, made in modules
        }
        return Adapter(name, changes, scale)

    adapters = (adapter("one", 0.5, ("matmul_1", 8, 8), ("conv_6", 36, 8)), adapter("two", -1.0, ("conv_6", 36, 8)))
    added = weight_changes(base, adapters)
    assert len(added) == 2
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in added:
            values = numpy_helper.to_array(tensor) + added[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    changed = onnxruntime.InferenceSession(model.SerializeToString()).run(None, FEEDS)[0]
    slotted = lora_slots(onnx.load(path), slots=2, rank=2)
    session = onnxruntime.InferenceSession(slotted.SerializeToString())
    given = slot_inputs([spec(value, "unet") for value in slotted.graph.input], adapters)
    np.testing.assert_allclose(session.run(None, {**FEEDS, **given})[0], changed, atol=1e-4)
    assert np.abs(onnxruntime.InferenceSession(path).run(None, FEEDS)[0] - changed).max() > 1e-2
    with pytest.raises(RequestError, match="three: no such projection, got 'other'"):
        weight_changes(base, (adapter("three", 1.0, ("other", 8, 8)),))
    with pytest.raises(RequestError, match=r"three: shape of matmul_1, got \(8, 4\), expected that of \(8, 8\)"):
        weight_changes(base, (adapter("three", 1.0, ("matmul_1", 4, 8)),))
