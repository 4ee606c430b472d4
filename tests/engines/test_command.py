"""`tandemrt build-engine` from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import openvino
import pytest

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import engines_folder

from ..runtime.test_backend_openvino import HAS_BF16
from .test_build import FEEDS, left_in, reference
from .test_layers import edited
from .test_retyped import halved

ONE = ["--target", "onnxruntime:cpu", "--component", "unet_small"]


def test_it_builds_explains_and_finds_again(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build-engine", str(tiny_path), *ONE, "--cache", str(tmp_path)]
    assert main([*command, "--explain"]) == 0
    assert "unet_small for onnxruntime:cpu: to be built: the cache has no engine of it" in capsys.readouterr().out
    assert left_in(tmp_path) == []
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "unet_small for onnxruntime:cpu: to be built, about " in out
    assert "unet_small for onnxruntime:cpu: built in " in out
    assert main([*command, "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert not engine["built"]
    assert Path(engine["folder"]) == engines_folder(tmp_path) / engine["key"]
    assert main([*command, "--explain"]) == 0
    assert capsys.readouterr().out == "unet_small for onnxruntime:cpu: in the cache\n"


def test_the_plan_is_shown(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles = ["--profile", "fast=64:guided", "--profile", "64..128:b1-b2"]
    arguments = ["--target", "tensorrt-rtx:sm89", "--target", "openvino:cpu", "--component", "unet", *profiles]
    assert main(["build-engine", str(tiny_path), *arguments, "--cache", str(tmp_path), "--print-plan"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(engine["target"], engine["profiles"]) for engine in shown["engines"]] == [
        ("tensorrt-rtx:sm89", ["fast", "64..128:b1-b2"]),
        ("openvino:cpu", ["fast"]),
        ("openvino:cpu", ["64..128:b1-b2"]),
    ]
    assert shown["engines"][1]["shapes"] == [
        "sample (2, 4, 8, 8), timestep (1), encoder_hidden_states (2, 12, 8)",
    ]
    assert all(engine["estimated_memory_bytes"] > 1e8 and not engine["cached"] for engine in shown["engines"])
    assert left_in(tmp_path) == []


def test_one_bundle_in_fp16_serves_tensorrt_rtx_in_fp16_and_openvino_in_bf16(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = edited(tiny_path, tmp_path / "bundle", halved, "fp16")
    targets = ["--target", "tensorrt-rtx:sm89+sm120:fp16", "--target", "openvino:cpu:bf16"]
    command = ["build-engine", str(bundle.path), *targets, "--component", "unet", "--cache", str(tmp_path / "cache")]
    if not HAS_BF16:
        assert main(command) == 1
        assert "no instructions for the precision" in capsys.readouterr().err
        return
    assert main([*command, "--json"]) == 0
    built = {engine["target"]: engine for engine in json.loads(capsys.readouterr().out)["engines"]}
    blob = Path(built["openvino:cpu:bf16"]["folder"]) / "engine.blob"
    compiled = openvino.Core().import_model(BytesIO(blob.read_bytes()), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    found, expected = compiled(FEEDS)[0], reference(Bundle.open(tiny_path))
    assert 1e-6 < np.abs(found - expected).max() / np.abs(expected).max() < 5e-2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--target", "onnxruntime:cpu", "--profile", "64..32"], 2, "range of width, got '64..32'"),
        (["--target", "onnxruntime:cpu", "--profile", "72"], 2, "expected a multiple of 16 pixels. Use 64."),
        (["--target", "onnxruntime:cpu", "--target", "onnxruntime:cpu"], 2, "given twice, got 'onnxruntime:cpu'"),
        (["--target", "onnxruntime:cpu", "--component", "unte"], 1, "no such component, got 'unte'"),
        (["--target", "directml:gpu"], 2, "backend, got 'directml:gpu'"),
        (["--target", "tensorrt-rtx:sm89:fp16"], 1, "--dtype fp16"),
        ([], 2, "the following arguments are required: --target"),
    ],
)
def test_unusable_arguments(
    arguments: list[str], status: int, message: str, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-engine", str(tiny_path), *arguments]) == status
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_a_build_and_leaves_nothing(shapes_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--target", "tensorrt-rtx:sm86+sm89+sm120", "--component", "unet", "--cache", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "tandemrt.runtime.cli", "build-engine", str(shapes_bundle), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("unet: ")  # a phase of the builder's
        (builder,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii").split()
        process.send_signal(signal.SIGINT)
        # Generous, as others may have the processor: that the builder is killed, not asked, is what makes it quick.
        _, told = process.communicate(timeout=60)
    assert not Path("/proc", builder).exists()
    assert process.returncode == 130
    assert "tandemrt build-engine: interrupted" in told
    assert left_in(tmp_path) == []
