"""What TensorRT's flavours are told, by a stand-in for their module: options, flags, measured times, other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tandemrt.engines import flavour
from tandemrt.engines import tensorrt as builders
from tandemrt.engines.build import ensure_engine, timings_file
from tandemrt.engines.flavour import Options
from tandemrt.engines.job import Job
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.runtime import engine_search, targets
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import SIDECAR_NAME, read_sidecar
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.errors import ArgumentError, EngineError, TargetError
from tandemrt.runtime.targets import Target, parse_target

from .conftest import Requests
from .test_build import VERSIONS, left_in, silent


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


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        ("sm75:fp32", r"products in fp32 .*, got 'sm75', expected sm80 .*Export .* --dtype fp16`, or leave sm75"),
        ("sm75+sm89:bf16", r"builds no bf16 .*, got 'sm75', .*Ask for tensorrt-rtx:sm75\+sm89:fp16, or leave sm75 out"),
        ("sm75+sm86+sm89:fp8", r"builds no fp8 .*, got 'sm75 and sm86', expected sm89 .*Leave sm75 and sm86 out"),
        ("sm75:fp16", None), ("sm75:int8", None), ("sm80+sm120:fp32", None), ("sm86:bf16", None), ("sm120:fp8", None),
        ("portable:bf16", None), ("portable:fp8", None),
    ],
)  # fmt: skip
def test_a_precision_that_an_architecture_lacks_is_refused(tiny: Bundle, target: str, refused: str | None) -> None:
    wanted, model = parse_target(f"tensorrt-rtx:{target}"), tiny.model_path("unet")
    if refused is None:
        flavour.require_precision("unet", wanted, model)
        return
    with pytest.raises(TargetError, match=f"unet: TensorRT-RTX .*{refused}"):
        flavour.require_precision("unet", wanted, model)


def test_fp32_without_matrix_products_is_built_for_every_architecture(tiny: Bundle) -> None:
    model = tiny.model_path("vae_decoder")
    flavour.require_precision("vae_decoder", parse_target("tensorrt-rtx:sm75:fp32"), model)


def test_memory_is_spoken_of_where_the_builder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for told, advised in (
        ("Error Code 1: Myelin (FP32 GEMM is not supported)", False),
        ("Error Code 2: OutOfMemory (Requested size was 42 bytes.)", True),
    ):
        module, log = stand_in(Config()), SimpleNamespace(errors=[told], layers=[], activations=[])
        module.Builder(None).build_serialized_network = lambda network, config: None
        monkeypatch.setattr(builders, "imported", lambda backend, module=module: module)
        monkeypatch.setattr(builders, "_log", lambda trt, log=log: log)
        job = Job(
            component="unet", model="x", folder=str(tmp_path), backend="tensorrt", device="sm90", precision="fp16",
            profiles=(), flags={}, timings=None,
        )  # fmt: skip
        with pytest.raises(EngineError) as raised:
            builders.build(job, silent)
        assert told in str(raised.value)
        assert ("Free memory, or build for fewer" in str(raised.value)) == advised


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
