"""Peers: the environments they share, what their scripts make of a bundle, and what they are given of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest

from tandemrt.bench import peer_table, shapes
from tandemrt.bench.contenders import SCRIPTS
from tandemrt.bench.entrants import Work, peer_device, peer_entrant
from tandemrt.bench.peer_table import interpreter, set_up
from tandemrt.bench.room import Weights
from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.rng import CpuGenerator
from tandemrt.runtime.solvers import compile_table
from tandemrt.runtime.targets import parse_target

from .processes import require_ended

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


# In an interpreter's place: notes what pip is asked to do, fails for optimum, and takes long for stable-diffusion.cpp.
PIP = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
*optimum*) echo "ERROR: no such version" >&2; exit 1;;
*stable-diffusion*) echo "compiling" >&2; sleep 60 & echo $! >> {log}; wait;;
esac
"""


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A log of what pip is asked to do in environments."""
    log = tmp_path / "log"

    def create(folder: Path, **_options: Any) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text(PIP.format(log=log), encoding="utf-8")
        (folder / "bin" / "python").chmod(0o700)

    monkeypatch.setattr(peer_table.venv, "create", create)
    return log


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A peer's script as a module, found as it is where it runs: beside `wire`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module(name)


def test_peers_of_the_same_requirements_share_an_environment(pip: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"has no environment yet.*tandemrt bench setup openvino-genai-bf16"):
        interpreter("openvino-genai-bf16", tmp_path)
    folder = set_up("openvino-genai", tmp_path)
    assert set_up("openvino-genai-bf16", tmp_path) == folder
    assert len(pip.read_text(encoding="utf-8").splitlines()) == 1
    assert interpreter("openvino-genai-bf16", tmp_path) == str(folder / "bin" / "python")
    assert interpreter("diffusers", tmp_path) == sys.executable


@pytest.mark.usefixtures("pip")
def test_an_environment_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"optimum: cannot be installed.*no such version"):
        set_up("optimum", tmp_path)
    assert not list((tmp_path / "peers").iterdir())


def test_an_installation_that_takes_too_long_is_given_up_with_its_compilers(
    pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_table, "_SETUP_TIMEOUT_S", 1)
    with pytest.raises(BenchmarkError, match=r"sdcpp: cannot be installed: pip took longer than 1 s\. compiling"):
        set_up("sdcpp", tmp_path)
    require_ended(int(pip.read_text(encoding="utf-8").splitlines()[-1]))
    assert not list((tmp_path / "peers").iterdir())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (subprocess.CalledProcessError(1, ["ensurepip"]), r"cannot be given pip\. Install .*python3-venv"),
        (OSError(28, "No space left on device"), r"cannot be made \(No space left on device\)"),
    ],
)
def test_an_environment_that_cannot_be_made_is_told(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(folder: Path, **_options: Any) -> None:
        folder.mkdir()
        raise error

    monkeypatch.setattr(peer_table.venv, "create", create)
    with pytest.raises(BenchmarkError, match=f"optimum: its environment {told}"):
        set_up("optimum", tmp_path)
    assert not list((tmp_path / "peers").iterdir())


@pytest.mark.parametrize(
    ("target", "device"),
    [
        ("onnxruntime:cpu:fp32", "cpu"),
        ("openvino:cpu", "cpu"),
        ("openvino:gpu", "gpu"),
        ("onnxruntime:cuda", "cuda"),
        ("onnxruntime:tensorrt-rtx", "cuda"),
        ("tensorrt:sm90:fp16", "cuda"),
    ],
)
def test_peers_run_beside_a_target_on_its_device_or_not_at_all(target: str, device: str, tmp_path: Path) -> None:
    work = Work(
        bundle=tmp_path,
        checkpoint=tmp_path,
        added={},
        prompt="",
        arguments={"num_images_per_prompt": 1},
        steps=(("unet", 1),),
        guidance_scale=1.0,
        height=64,
        width=64,
        decoder=None,
        threads=1,
        device=peer_device(parse_target(target)),
        cache=tmp_path,
        weights=Weights(),
    )
    assert work.device == device
    told = "has no environment yet" if device == "cpu" else f"runs on the CPU here, TandemRT on {device}"
    with pytest.raises(BenchmarkError, match=told):
        peer_entrant(work, "optimum").start()
    if device == "gpu":
        with pytest.raises(BenchmarkError, match="TandemRT on gpu"):
            peer_entrant(work, "diffusers").start()


def diffusers_job(**differs: Any) -> dict[str, Any]:
    """A job of its script on the shapes family's checkpoint."""
    job = {"checkpoint": str(Path(shapes.__file__).parent / "weights" / "large"), "steps": [["unet", 1]], "added": {}}
    job |= {"dtype": "float32", "compile": False, "decoder": None, "threads": None, "pictures": 1, "device": "cpu"}
    return {**job, "prompt": "a red circle", "guidance_scale": 1.0, "height": 64, "width": 64, **differs}


def test_all_that_diffusers_runs_is_on_the_device_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Path(shapes.__file__).parent / "weights"
    job = diffusers_job(steps=[["unet", 1], ["unet_small", 1]], added={"unet_small": str(weights / "small")})
    job |= {"decoder": str(weights / "vae_tiny"), "device": "meta"}
    painter = script("torch_diffusers", monkeypatch).Diffusers(job)
    assert painter.setting()["device"] == "meta"
    modules = [*painter._denoisers.values(), painter._pipe.vae, painter._pipe.text_encoder]
    assert {each.device.type for module in modules for each in module.parameters()} == {"meta"}
    # No part is timed: it would end before the device has done it.
    assert "decode" not in vars(painter._pipe.vae)


def test_a_module_of_the_runtime_is_borrowed_without_its_packages() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from borrowed import runtime_module; "
        "print(runtime_module('rng').CpuGenerator(7).randn((4, 5)).tolist()); "
        "assert not {'tandemrt', 'tokenizers', 'msgspec', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(SCRIPTS)], capture_output=True, text=True, check=True)
    assert np.array_equal(np.float32(json.loads(done.stdout)), CpuGenerator(7).randn((4, 5)))


@pytest.mark.parametrize(
    ("given", "otherwise"),
    [
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 2}, "DDIM in place of DEISMultistep"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "DDIM in place of DPMSolverMultistep"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, ""),
    ],
)
def test_a_solver_that_openvino_genai_lacks_becomes_what_is_the_same_for_one_step(
    given: dict[str, Any], otherwise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(BETAS | given), encoding="utf-8")
    made, told = script("openvino_genai_pipeline", monkeypatch).scheduler_config(tmp_path)
    assert told == otherwise
    was, now = (compile_table(one["_class_name"], one, 1) for one in (BETAS | given, made))
    assert np.array_equal(was.timesteps, now.timesteps)
    # What the one row makes of the latent and the prediction.
    assert np.allclose(was.transition[0, 0, 0] * was.init_noise_sigma, now.transition[0, 0, 0], rtol=1e-6)
    assert np.allclose(was.prediction[0, 0], now.prediction[0, 0], rtol=1e-6)


def test_a_compiler_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        script("torch_diffusers", monkeypatch).compiling_afresh()


@pytest.mark.parametrize(
    ("dtype", "device", "told"),
    [
        ("float32", "cuda", "float32, convolutions in TF32"),
        ("bfloat16", "cuda", "bfloat16"),
        ("float32", "cpu", "float32"),
    ],
)
def test_what_pytorch_computes_in_is_told(dtype: str, device: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: PLC0415 (seconds)

    assert script("torch_diffusers", monkeypatch).precision_told(dtype, torch.device(device)) == told


def test_what_is_compiled_does_not_see_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    peer = script("torch_diffusers", monkeypatch)
    monkeypatch.setattr(peer, "compiling_afresh", lambda: None)
    monkeypatch.setattr("torch.compile", lambda function: compiled.append(function) or function)
    painter, clock = peer.Diffusers(diffusers_job(compile=True)), peer.Clock()
    assert painter.paint(0, {}, clock).shape == (64, 64, 3)
    assert {"text_s", "unet_s", "decode_s"} == set(clock.figures)
    # The models' own methods: a compiled clock would be compiled anew for every picture, which has one of its own.
    assert [type(function) for function in compiled] == [MethodType, MethodType]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What stable-diffusion.cpp's script reads of one before it is opened, but for its scheduler."""
    vocabulary = {str(number): number for number in range(49408)}
    vocabulary |= {"<|startoftext|>": vocabulary.pop("49406"), "cat</w>": vocabulary.pop("2368")}
    files = {"unet/config.json": {"block_out_channels": [320, 640]}, "tokenizer/vocab.json": vocabulary}
    for name, facts in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / "scheduler").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "method", "otherwise"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "euler", ""),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpm++2m", ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "euler", "in place of DPMSolverMultistep"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "euler", "Euler in place of PNDM"),
    ],
)
def test_stable_diffusion_cpp_is_given_the_checkpoints_noise_levels(
    given: dict[str, Any], method: str, otherwise: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BETAS | given | {"timestep_spacing": "trailing"}
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    peer = script("stable_diffusion_cpp_pipeline", monkeypatch)
    peer.require_known(checkpoint)
    used, sigmas, told = peer.sampling(checkpoint, 4)
    assert used == method
    assert (otherwise in told) if otherwise else not told
    # diffusers' EulerDiscreteScheduler with this configuration.
    assert sigmas == pytest.approx((14.614647, 4.081731, 1.612887, 0.693205, 0.0), abs=1e-5)
    vocabulary = json.loads((checkpoint / "tokenizer" / "vocab.json").read_bytes())
    vocabulary["cat</w>"], vocabulary["7"] = 7, 2368
    (checkpoint / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    unet = {"block_out_channels": [320, 640], "only_cross_attention": [True, False]}
    (checkpoint / "unet" / "config.json").write_text(json.dumps(unet), encoding="utf-8")
    told = peer.sampling(checkpoint, 4)[2]
    assert "attention to the image" in told and "CLIP's vocabulary in place of the checkpoint's" in told


@pytest.mark.parametrize(("width", "layers", "skip"), [(768, 12, 1), (1024, 23, 2)])
def test_layers_that_a_text_encoder_leaves_out_are_not_computed(
    width: int, layers: int, skip: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = script("stable_diffusion_cpp_pipeline", monkeypatch)
    (checkpoint / "text_encoder").mkdir()
    config = json.dumps({"hidden_size": width, "num_hidden_layers": layers})
    (checkpoint / "text_encoder" / "config.json").write_text(config, encoding="utf-8")
    assert peer.clip_skip(checkpoint) == skip
    (checkpoint / "text_encoder_2").mkdir()
    assert peer.clip_skip(checkpoint) == -1


@pytest.mark.parametrize(
    ("file", "facts", "told"),
    [
        ("unet/config.json", {"block_out_channels": [40, 80]}, "width, 320; this one begins with 40"),
        ("tokenizer/vocab.json", {"a": 0}, "built in, of 49408 tokens; this checkpoint has one of 1"),
    ],
)
def test_what_stable_diffusion_cpp_does_not_know_is_told(
    file: str, facts: dict[str, Any], told: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / file).write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        script("stable_diffusion_cpp_pipeline", monkeypatch).require_known(checkpoint)


def test_a_checkpoint_without_a_model_is_no_name_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder = script("torch_diffusers", monkeypatch).model_folder
    with pytest.raises(FileNotFoundError, match=r"neither it nor unet in it has a config\.json"):
        model_folder(str(tmp_path), "unet")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}", encoding="utf-8")
    assert model_folder(str(tmp_path), "unet") == tmp_path / "unet"
