"""Targets: how they are written, what runs on this machine, and what is missing for the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnxruntime
import pytest

from tandemrt.runtime import targets
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import ArgumentError, TargetError
from tandemrt.runtime.targets import Target, parse_target, probe_backends

from .tiny_bundle import quantization_in, write_tiny_bundle

CPU = Target("onnxruntime", "cpu")
OPENVINO = Target("openvino", "cpu", "fp32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "onnxruntime:cpu:fp32",
        "onnxruntime:cpu",
        "onnxruntime:cuda:fp16",
        "openvino:cpu:bf16",
        "tensorrt-rtx:sm89+sm120:fp16",
        "tensorrt-rtx:portable:bf16",
        "tensorrt:sm90:fp8",
    ],
)
def test_targets_read_and_write_the_same(text: str) -> None:
    assert str(parse_target(text)) == text


def test_auto_says_why() -> None:
    target = parse_target("auto")
    assert target == CPU
    assert target.reason
    assert target.precision is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "backend, got '', expected auto or one of onnxruntime, openvino, tensorrt-rtx, tensorrt"),
        ("coreml:cpu:fp32", "backend, got"),
        ("AUTO", "backend, got"),
        ("onnxruntime", "expected onnxruntime:DEVICE with DEVICE one of cpu, cuda, tensorrt, tensorrt-rtx"),
        ("onnxruntime:tpu:fp32", "device"),
        ("onnxruntime:cpu:fp32:x", "device"),
        ("tensorrt:cuda:fp16", "DEVICE one of sm89, several as sm89\\+sm120, or portable"),
        ("tensorrt:sm90+:fp16", "device"),
        (
            "tensorrt-rtx:SM89",
            "DEVICE one of sm75, sm80, sm86, sm89, sm120, sm121, several as sm89",
        ),
        ("tensorrt-rtx:", "DEVICE one of sm75, sm80,"),
        ("onnxruntime:cpu:fp8", "precision, got 'onnxruntime:cpu:fp8', expected one of fp32, fp16"),
        ("onnxruntime:cpu:", "precision"),
    ],
)
def test_malformed_targets_are_arguments_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("openvino:npu", "got 'openvino:npu', expected onnxruntime:cpu"),
        ("openvino:gpu:fp16", "target openvino:gpu: device that is not here, got 'gpu', expected one of cpu"),
    ],
)
def test_targets_that_cannot_run_say_so(text: str, message: str, tiny: Path) -> None:
    with pytest.raises(TargetError, match=message):
        open_session(tiny / "unet" / "model.onnx", parse_target(text))


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "_NVIDIA", tmp_path)
    monkeypatch.setattr(targets, "_NVIDIA_DEVICES", ())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "_NVIDIA_DEVICES", (tmp_path,))


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("device", ["cuda", "tensorrt", "tensorrt-rtx"])
def test_gpu_providers_without_a_gpu_are_one_sentence(device: str, tiny: Path) -> None:
    message = (
        f"target onnxruntime:{device}:fp32: needs an NVIDIA GPU, and no NVIDIA driver is running here. "
        "Use --target auto, or a machine with such a GPU."
    )
    with pytest.raises(TargetError) as raised:
        open_session(tiny / "unet" / "model.onnx", parse_target(f"onnxruntime:{device}:fp32"))
    assert str(raised.value) == message


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "cuda",
            r"provider that this ONNX Runtime has not, got 'CUDAEx.*one of .*CPUExecutionProvider\. Run",
        ),
        ("tensorrt", r"got 'TensorrtExecutionProvider'.* then `pip install \"tandemrt\[gpu\]\"`"),
        ("tensorrt-rtx", r"its provider cannot be loaded .*Run `pip install onnxruntime-ep-nv-tensorrt-rtx`"),
    ],
)
def test_gpu_providers_that_are_not_installed_say_what_to_install(
    device: str, message: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(TargetError, match=message):
        open_session(tiny / "unet" / "model.onnx", Target("onnxruntime", device))


@pytest.mark.usefixtures("driver")
def test_auto_and_doctor_take_the_gpu_where_its_provider_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    target = parse_target("auto")
    assert str(target) == "onnxruntime:cuda"
    assert "GPU" in target.reason
    assert [one.device for one in probe_backends()[0].targets][:2] == ["cpu", "cuda"]


def test_what_is_asked_of_a_component(tiny: Path) -> None:
    components = Bundle.open(tiny).manifest.components
    unet, encoder = components["unet"], components["text_encoder"]
    assert str(parse_target("openvino:cpu").of_component(unet)) == "openvino:cpu:fp32"
    assert str(parse_target("openvino:cpu:bf16").of_component(encoder)) == "openvino:cpu:bf16"
    assert str(parse_target("openvino:cpu:int8").of_component(encoder)) == "openvino:cpu:fp32"
    quantized = msgspec.structs.replace(unet, quantization=quantization_in("int8"))
    for asked, own in (("", ":int8"), (":int8", ":int8"), (":fp32", ":fp32"), (":bf16", ":bf16")):
        assert str(parse_target(f"openvino:cpu{asked}").of_component(quantized)) == f"openvino:cpu{own}"
    weights = msgspec.structs.replace(unet, quantization=quantization_in("int8-weights"))
    assert str(parse_target("openvino:cpu").of_component(weights)) == "openvino:cpu:fp32"


def test_what_is_quantized_is_told_by_the_manifest(tiny: Path) -> None:
    manifest = Bundle.open(tiny).manifest
    unet = msgspec.structs.replace(manifest.components["unet"], quantization=quantization_in("int8"))
    with_it = msgspec.structs.replace(manifest, components={**manifest.components, "unet": unet})
    for target in ("openvino:cpu", "openvino:cpu:bf16", "onnxruntime:cpu:int8"):
        parse_target(target).check_quantized("bundle", with_it)
    parse_target("openvino:cpu").check_quantized("bundle", manifest)
    for target, of, got in (
        ("openvino:cpu:int8", manifest, "fp32"),
        ("tensorrt-rtx:sm89:fp8", with_it, "fp32, int8"),
    ):
        device, precision = target.rsplit(":", 1)
        told = (
            f"bundle: nothing in it is quantized to {precision}, for target {target}, got '{got}'. Make one that is "
            f"with `tandemrt calibrate quantize bundle --format {precision}`, or ask for {device}."
        )
        with pytest.raises(TargetError) as caught:
            parse_target(target).check_quantized("bundle", of)
        assert str(caught.value) == told


def test_another_precision_than_the_model_s_is_refused() -> None:
    for target in ("auto", "onnxruntime:cpu", "onnxruntime:cpu:fp16"):
        parse_target(target).check_precision("unet", "fp16")
    with pytest.raises(TargetError, match="unet: precision of the exported model, got 'fp16', expected fp32"):
        parse_target("onnxruntime:cpu:fp32").check_precision("unet", "fp16")


def test_the_probe_finds_what_is_installed() -> None:
    statuses = {status.backend: status for status in probe_backends()}
    assert list(statuses) == ["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt"]
    status = statuses["onnxruntime"]
    assert status.version == onnxruntime.__version__
    assert "CPUExecutionProvider" in status.devices
    assert status.targets == (CPU,)
    assert status.missing == ()
    assert OPENVINO.device in [target.device for target in statuses["openvino"].targets]
    assert statuses["openvino"].devices[0] == "CPU"
    assert statuses["openvino"].missing == ()
    for name in ("tensorrt-rtx", "tensorrt"):
        assert statuses[name].targets == ()
        assert statuses[name].missing


Versions = dict[str, str]


@pytest.mark.parametrize(
    ("versions", "missing"),
    [
        ({}, ('onnxruntime is not installed: pip install "tandemrt[cpu]"',)),
        (
            {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.0"},
            (
                "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, then "
                'pip install "tandemrt[cpu]"',
            ),
        ),
    ],
)
def test_the_probe_says_what_is_missing(
    versions: Versions, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: Callable[[tuple[str, ...]], Versions] = lambda names: {  # noqa: E731
        name: version for name, version in versions.items() if name in names
    }
    monkeypatch.setattr(targets, "_installed_versions", installed)
    status = probe_backends()[0]
    assert status.missing == missing
    assert status.targets == ()


def test_a_broken_onnxruntime_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status = probe_backends()[0]
    assert status.version == onnxruntime.__version__
    assert status.targets == ()
    assert "cannot be imported" in status.missing[0]


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_NVIDIA", tmp_path)
    assert targets.nvidia_gpus() == ()
    for slot, text in (("0000:01:00.0", "Model: \t\t NVIDIA H200\nIRQ: 1\n"), ("0000:02:00.0", "IRQ: 2\n")):
        (tmp_path / "gpus" / slot).mkdir(parents=True)
        (tmp_path / "gpus" / slot / "information").write_text(text)
    assert targets.nvidia_gpus() == ("NVIDIA H200", "0000:02:00.0")
    assert not any("driver" in sentence for sentence in probe_backends()[-1].missing)
