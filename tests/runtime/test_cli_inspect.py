"""`tandemrt inspect` and `tandemrt verify` on a bundle of a few kilobytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.calibrations import Calibrations, SplitCalibration, SplitPoint
from tandemrt.runtime.cli import main
from tandemrt.runtime.cli.inspect_bundle import size_text, speed_text, worst_evidence
from tandemrt.runtime.manifest import Evidence, Manifest, SchedulerDefaults
from tandemrt.runtime.manifest_files import MANIFEST_NAME
from tandemrt.runtime.solvers.config import KEYS

from .tiny_bundle import resign, write_tiny_bundle
from .tiny_families import write_tiny_lcm, write_tiny_sd3, write_tiny_sdxl


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_inspect_shows_every_component(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    stdout = capsys.readouterr().out
    for name in ("text_encoder", "unet", "unet_small", "vae_decoder", "vae_decoder_tiny"):
        assert f"\n{name} " in stdout
    assert Bundle.open(bundle).digest in stdout
    assert "(batch, 4, height, width)" in stdout
    assert "DPMSolverMultistepScheduler" in stdout


def test_inspect_leaves_out_what_a_scheduler_has_by_default(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {name: key.default for name, key in KEYS["UniPCMultistepScheduler"].items()}
    config = {**defaults, "beta_start": 0.5, "of_no_class": None, "_private": 1}
    scheduler = SchedulerDefaults(class_name="UniPCMultistepScheduler", config=config)
    resign(bundle, lambda manifest: msgspec.structs.replace(manifest, scheduler=scheduler))
    assert main(["inspect", str(bundle)]) == 0
    assert "UniPCMultistepScheduler (beta_start=0.5, of_no_class=None)\n" in capsys.readouterr().out
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["scheduler"]["config"]) == set(config)


def test_inspect_as_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    facts = json.loads(stdout)
    assert stderr == ""
    manifest = Bundle.open(bundle).manifest
    assert facts["files"] == len(manifest.files)
    assert list(facts["components"]) == list(manifest.components)
    unet = facts["components"]["unet"]
    # Model and external data.
    assert unet["size_bytes"] == sum(path.stat().st_size for path in (bundle / "unet").iterdir())
    assert unet["worst_evidence"]["max_relative_error"]["threshold"] == 1e-4
    assert facts["latent"] == msgspec.to_builtins(manifest.latent)


def test_inspect_tells_the_split_that_runs_by_default(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point = SplitPoint(steps=(("unet", 4), ("unet_small", 6)), cost=0.58, latent_error=0.1, psnr_db=20.0, ssim=0.9)
    split = SplitCalibration(
        files_sha256=Bundle.open(bundle).manifest.files_digest,
        large="unet", small="unet_small", target="onnxruntime:cpu:fp32", threads=2, machine=(), versions={},
        row_times={}, prompts=64, prompts_sha256="0" * 64, seed=0, scorer=None, scorer_sha256=None, budget=0.6,
        chosen_by="latent_error", points=(point,),
    )  # fmt: skip

    def stored(manifest: Manifest) -> Manifest:
        defaults = msgspec.structs.replace(manifest.defaults, steps=point.steps)
        return msgspec.structs.replace(manifest, defaults=defaults, calibrations=Calibrations(split=split))

    resign(bundle, stored)
    assert main(["inspect", str(bundle)]) == 0
    stdout = capsys.readouterr().out
    assert "other models" not in stdout
    assert "10 steps (unet 4, unet_small 6)" in stdout
    assert "of 1 plans, 64 prompts, on onnxruntime:cpu:fp32, 2 threads; the default costs 0.580 of unet alone" in stdout
    (bundle / "model_index.json").write_text("{}")
    resign(bundle)
    assert main(["inspect", str(bundle)]) == 0
    assert "0.580 of unet alone; measured with other models than these\n" in capsys.readouterr().out


def test_inspect_needs_no_backend(bundle: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('onnxruntime', 'openvino', 'tensorrt', 'torch', 'onnx')))\n"
        "from tandemrt.runtime.cli import main\n"
        f"sys.exit(main(['inspect', {str(bundle)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_worst_evidence_is_the_one_closest_to_its_threshold(bundle: Path) -> None:
    figures = [(1e-3, 1e-1), (5e-5, 1e-4), (1e-6, 1e-4)]
    evidence = tuple(Evidence(metric="m", value=value, threshold=limit, input_shapes={}) for value, limit in figures)
    component = msgspec.structs.replace(Bundle.open(bundle).manifest.components["unet"], evidence=evidence)
    assert worst_evidence(component) == {"m": evidence[1]}


def test_sizes() -> None:
    assert [size_text(size) for size in (12, 2_500, 3_400_000, 2_000_000_000)] == [
        "0.0 kB",
        "2.5 kB",
        "3.4 MB",
        "2.0 GB",
    ]


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "newer", "not a bundle"])
def test_a_damaged_bundle_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], command: str, damage: str
) -> None:
    model, manifest = bundle / "unet_small" / "model.onnx", bundle / MANIFEST_NAME
    raw = model.read_bytes()
    if damage == "flipped":
        model.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "truncated":
        model.write_bytes(raw[:-1])
    elif damage == "missing":
        model.unlink()
    elif damage == "newer":
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    else:
        manifest.unlink()
    named = {"newer": str(manifest), "not a bundle": str(bundle)}.get(damage, str(model))
    out = bundle.parent / "out"
    prompt = ["--prompt", "red", "--output-dir", str(out)] if command == "generate" else []
    assert main([command, str(bundle), *prompt]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith(f"tandemrt {command}: {named}: ")
    assert stderr.count("\n") == 1
    assert not out.exists()


def test_what_families_add_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_sdxl(tmp_path / "sdxl")
    write_tiny_sd3(tmp_path / "sd3", t5=False)
    write_tiny_lcm(tmp_path / "lcm")
    told = {}
    for name in ("sdxl", "sd3", "lcm"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        told[name] = " ".join(capsys.readouterr().out.split())
    assert (
        "text_encoder_2: 12 tokens of width 10, hidden_states.3 and text_embeds; zeros where there is no"
        in told["sdxl"]
    )
    assert "; zeros for 20 tokens of an encoder that was left out" in told["sd3"]
    assert "guidance scale 8.5, time steps 799, 399" in told["lcm"]


@pytest.mark.parametrize(
    ("ratio", "least", "told"),
    [
        (1.3, 1.1, "1.30 times as long (1.10 to 1.50 in 5 rounds): slower here; on openvino:cpu, 2 threads"),
        (1.3, 0.9, "(0.90 to 1.50 in 5 rounds): slower here, but not in every round; on"),
        (
            0.8,
            0.7,
            "a call takes 8 ms beside 10 ms in floating point, 0.80 times as long (0.70 to 1.50 in 5 rounds); on",
        ),
    ],
)
def test_a_slower_component_is_told_plainly(ratio: float, least: float, told: str) -> None:
    speed = {"float_ms": 10.0, "quantized_ms": 10 * ratio, "ratio": ratio, "least_ratio": least, "most_ratio": 1.5}
    assert told in speed_text({**speed, "rounds": 5, "target": "openvino:cpu", "threads": 2})
