"""`tandemrt build-engine` from the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest

from tandemrt.engines import build as builds
from tandemrt.engines import command as module
from tandemrt.engines import estimate
from tandemrt.engines.build import Outcome, ensure_engine
from tandemrt.engines.plan import Request
from tandemrt.runtime.build_commands import build_command
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import EngineError
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import PLAIN

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
    slots = ["--lora-slots", "1", "--lora-rank", "4"]
    assert main([*command, *slots, "--print-plan"]) == 0
    assert "changed" not in (out := capsys.readouterr().out)
    assert "nearest" not in out
    assert main([*command, *slots, "--explain"]) == 0
    told = "(1 LoRA slot of rank 4) for onnxruntime:cpu: to be built: the nearest engine there is plain for onnx"
    assert told in capsys.readouterr().out


def test_the_plan_is_shown(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiles = ["--profile", "fast=64:guided", "--profile", "64..128:b1-b2"]
    arguments = ["--target", "tensorrt-rtx:sm89", "--target", "openvino:cpu", "--component", "unet", *profiles]
    command = ["build-engine", str(tiny_path), *arguments, "--cache", str(tmp_path), "--print-plan"]
    assert main(command) == 0
    first, fast, wide, *_, together = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"unet for tensorrt-rtx:sm89, fast; 64..128:b1-b2: to be built, about 0.\d GB of memory, \d+ s, \d+ MB on disk",
        first,
    )
    shapes, call = fast.split("; ")
    assert shapes == "  fast: sample (2, 4, 8, 8), timestep (1), encoder_hidden_states (2, 12, 8)"
    assert call == "its largest call takes about 0.0 MB beside the weights, 0.0 G multiply-adds"
    assert wide.startswith("  64..128:b1-b2: sample (1..4, 4, 8..16, 8..16), ")
    assert re.fullmatch(
        rf"4 engines to be built one after the other, about .*; 0 in the cache \({re.escape(str(tmp_path))}\)", together
    )
    assert main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(engine["target"], engine["variant"], engine["profiles"]) for engine in shown["engines"]] == [
        ("tensorrt-rtx:sm89", "plain", ["fast", "64..128:b1-b2"]),
        ("tensorrt-rtx:sm89", "update", ["fast", "64..128:b1-b2"]),
        ("openvino:cpu", "plain", ["fast"]),
        ("openvino:cpu", "plain", ["64..128:b1-b2"]),
    ]
    assert shown["engines"][2]["shapes"] == [
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
        (["--target", "onnxruntime:cpu", "--profile", "64..32"], 2, "range of width in pixels, got '64..32'"),
        (["--target", "onnxruntime:cpu", "--profile", "72"], 2, "expected a multiple of 16 pixels. Use 64."),
        (["--target", "onnxruntime:cpu", "--target", "onnxruntime:cpu"], 2, "given twice, got 'onnxruntime:cpu'"),
        (["--target", "onnxruntime:cpu", "--profile", "0x0"], 2, "width in pixels, got '0', expected a number in 1.."),
        (
            ["--target", "openvino:fpga", "--target", "directml"],
            2,
            "--target: 2 of 2 cannot be used: (1) target: device",
        ),
        (
            ["--target", "openvino:gpu", "--target", "onnxruntime:cpu", "--target", "tensorrt-rtx:sm99"],
            1,
            "--target: 2 of 3 cannot be used: (1) target openvino:gpu: device that is not here, got 'gpu', expected "
            "one of cpu. (2) target tensorrt-rtx: GPU architecture, got 'sm99'",
        ),
        (
            ["--target", "openvino:gpu", "--target", "directml", "--target", "onnxruntime:cpu"],
            1,
            "one of cpu. (2) target: backend, got 'directml', expected auto or one of onnxruntime, openvino, "
            "tensorrt-rtx, tensorrt.\n",
        ),
        (
            ["--target", "onnxruntime:cpu", "--lora-slots", "0", "--lora-rank", "4"],
            2,
            "--lora-slots, --lora-rank: not both from 1 on, got (0, 4), expected both 1 or more, or neither.",
        ),
        (
            ["--target", "onnxruntime:cpu", "--step", "--fold-steps", "0"],
            2,
            "--fold-steps: not a number of steps from 1",
        ),
        (
            ["--target", "onnxruntime:cpu", "--step", "--fold-steps", "5000"],
            2,
            "--fold-steps: cannot be used, got 5000, expected a whole number in 1..1000.",
        ),
        (["--target", "onnxruntime:cpu", "--component", "unte"], 2, "--component: no such component, got 'unte'"),
        (["--target", "tensorrt-rtx:sm90"], 2, "GPU architecture, got 'sm90', expected one of sm75, sm80,"),
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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineError("unet", "cannot be built"), "unet: cannot be built."),
        (EngineError("engines/.part/engine.blob", "cannot be built"), "engines/.part/engine.blob: cannot be built."),
        (ValueError("of onnx"), "failed unexpectedly (ValueError: of onnx)."),
    ],
)
def test_a_build_that_fails_leaves_the_others_alone(
    error: Exception,
    told: str,
    tiny_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(request: Request, *rest: Any) -> Outcome:
        if request.component == "unet":
            raise error
        return ensure_engine(request, *rest)

    monkeypatch.setattr(module, "ensure_engine", failing)
    monkeypatch.chdir(tmp_path)
    cache = ["--cache", "."]
    command = ["build-engine", str(tiny_path), "--target", "onnxruntime:cpu", "--component", "unet", *cache]
    assert main([*command, "--component", "unet_small", "--component", "vae_decoder"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert f"unet for onnxruntime:cpu: not built: {told}" in err
    # Each is told as it ends, before the next one is spoken of.
    small, decoder = (f"{name} for onnxruntime:cpu: " for name in ("unet_small", "vae_decoder"))
    assert [line.partition("about")[0] for line in lines[1:3]] == [f"{small}to be built, ", lines[2]]
    assert lines[2].startswith(f"{small}built in ")
    assert lines[3].startswith(f"{decoder}to be built, ")
    assert re.match(r"2 engines built in \d+\.\d s, 0 in the cache before, 1 failed \(", lines[-1])
    assert len(left_in(tmp_path)) == 2
    assert main(command) == 1  # alone it is an error as any other
    assert capsys.readouterr().err.startswith(f"tandemrt build-engine: {told}")


def test_where_one_engine_has_no_room_a_smaller_one_may(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000_000))
    sizes = {"unet": 10**9}
    monkeypatch.setattr(builds, "estimated_size_bytes", lambda request: sizes.get(request.component, 0))
    command = ["build-engine", str(tiny_path), "--target", "onnxruntime:cpu", "--cache", str(tmp_path)]
    components = ["--component", "unet", "--component", "unet_small"]
    assert main([*command, *components]) == 1
    out, err = capsys.readouterr()
    assert "unet for onnxruntime:cpu: not built: " in err
    assert "too little space: 100.0 MB are free, and the build needs about 1000.0 MB. Free some space" in err
    assert re.search(r"1 engine built in \d+\.\d s, 0 in the cache before, 1 failed \(1 for want of space\) \(", out)
    assert len(left_in(tmp_path)) == 1


def test_a_call_beyond_the_machines_memory_is_warned_of(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "memory_bytes", lambda kind: 1)
    command = ["build-engine", str(tiny_path), *ONE, "--profile", "128", "--cache", str(tmp_path)]
    assert main([*command, "--print-plan"]) == 0
    assert "G multiply-adds; more memory than this machine has" in capsys.readouterr().out
    assert main(command) == 0
    assert "unet_small for onnxruntime:cpu: by estimate, the largest call at 128 takes" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_ends_it_all(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert main(["build-engine", str(tiny_path), "--target", "onnxruntime:cpu", "--cache", str(tmp_path / "file")]) == 1
    out, err = capsys.readouterr()
    assert err.count("the cache cannot be written") == 1
    assert "not built" not in out + err


def test_a_cache_to_run_on_has_to_be_there(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    command = ["generate", str(tiny_path), "--prompt", "red", "--target", "onnxruntime:cpu", "--print-plan"]
    for name, status in (("mistyped", 2), ("file", 2), ("", 0)):
        assert main([*command, "--cache", str(tmp_path / name)]) == status
        told = f"cache: not a folder that is there, got '{tmp_path / name}'. `tandemrt build-engine"
        assert (told in capsys.readouterr().err) == bool(status)
    assert not (tmp_path / "mistyped").exists()


def test_generate_runs_on_the_engines_of_the_cache_that_it_is_given(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "none"))
    target, cache = ["--target", "onnxruntime:cpu"], tmp_path / "its cache"
    assert main(["build-engine", str(tiny_path), *target, "--component", "unet", "--step", "--cache", str(cache)]) == 0
    for number, given in enumerate(([], ["--cache", str(cache)])):
        capsys.readouterr()
        settings = [
            "--prompt",
            "red",
            "--num-inference-steps",
            "2",
            "--output-dir",
            str(tmp_path / str(number)),
            "--json",
        ]
        assert main(["generate", str(tiny_path), *target, *settings, *given]) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert image["step_engines"] is bool(given)
    command = build_command(Bundle.open(tiny_path), "unet", parse_target("openvino:cpu"), PLAIN, cache=cache)
    assert command.endswith(f"--component unet --cache '{cache}'")


def test_ctrl_c_ends_a_build_and_leaves_nothing(shapes_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--target", "tensorrt-rtx:sm86+sm89+sm120", "--component", "unet", "--cache", str(tmp_path)]
    with subprocess.Popen(
        # Tests that run in a shell's background have Ctrl-C ignored, and so would what they start.
        ["env", "--default-signal=INT", sys.executable, "-m", "tandemrt.runtime.cli", "build-engine",
         str(shapes_bundle), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
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
