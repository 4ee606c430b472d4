"""The `export` command: its arguments, and what it does before torch is needed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemrt.export import bundle as bundles
from tandemrt.export.command import add_arguments, plan_facts, plan_from_arguments, run, summary
from tandemrt.export.plan import Added, ExportPlan, LoraSource, PresetPlan, parse_lora
from tandemrt.runtime.errors import ArgumentError, ExportError

pytestmark = pytest.mark.slow


def parse(*arguments: str) -> ExportPlan | PresetPlan:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return plan_from_arguments(parser.parse_args(arguments))


def test_small_and_tiny_are_short_for_add() -> None:
    short = parse("c", "out", "--small", "s", "--tiny-vae", "t", "--add", "unet_one_step=o")
    names = ("unet_small=s", "vae_decoder_tiny=t", "unet_one_step=o")
    assert short == parse("c", "out", *(word for name in names for word in ("--add", name)))
    assert [added.role for added in short.added] == ["denoiser", "vae_decoder", "denoiser"]


def test_options_reach_the_plan() -> None:
    plan = parse("c", "out", "--dtype", "fp16", "--guidance-scale", "2", "--denoising-steps", "8", "--force")
    assert plan == ExportPlan(
        Path("c"), Path("out"), dtype="fp16", guidance_scale=2.0, num_inference_steps=8, force=True
    )
    plan = parse(
        "c", "out", "--denoiser", "u", "--vae", "v", "--solver", "lcm", "--timesteps", "800", "--solver-config",
        "original_inference_steps=100", "--eta", "0.5", "--lora", "a:-0.5", "--lora", "b",
    )  # fmt: skip
    assert plan == ExportPlan(
        Path("c"), Path("out"), denoiser=Path("u"), vae=Path("v"), solver="lcm", timesteps=(800,), eta=0.5,
        loras=(LoraSource(Path("a"), -0.5), LoraSource(Path("b"))),
        solver_config={"original_inference_steps": 100},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("l.safetensors", "l.safetensors", 1.0),
        ("l.safetensors:0.125", "l.safetensors", 0.125),
        ("a:1/l:2:-.5e1", "a:1/l:2", -5.0),
        ("a:1/l", "a:1/l", 1.0),
        ("C:\\l", "C:\\l", 1.0),
        ("l:0", "l", 0.0),
        ("l:", "l:", 1.0),
    ],
)
def test_a_scale_is_the_number_behind_the_last_colon(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == LoraSource(Path(path), scale)


@given(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False))
def test_any_path_comes_back_with_its_scale(path: str, scale: float) -> None:
    assert parse_lora(f"{path}:{scale!r}") == LoraSource(Path(path), scale)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--add", "unet_small"], "--add: not a source, got 'unet_small', expected NAME=DIR"),
        (["--add", "unet="], "--add: not a source"),
        (["--add", "Unet_x=d"], "component name, got 'Unet_x', expected unet_NAME, transformer_NAME, vae_decoder_NAME"),
        (["--add", "../x=d"], "component name"),
        (["--add", "unet_/../x=d"], "component name"),
        (["--small", "d", "--add", "unet_small=e"], "a component given twice, got 'unet_small'"),
        (["--scale", "tiny"], "--scale: is of presets only, got 'tiny'"),
        (["--preset", "sd15"], "CHECKPOINT: given beside --preset, which names every model and the scheduler, got 'c'"),
        (["--lora", ":0.5"], "--lora: not a LoRA, got ':0.5', expected FILE or FILE:SCALE"),
        (["--lora", "l:nan"], "--lora: scale of l, got nan, expected a finite number"),
        (["--lora", "l:1e999"], "--lora: scale of l, got inf"),
        (["--guidance-scale", "nan"], "--guidance-scale: guidance, got nan"),
        (["--guidance-scale", "-1"], "--guidance-scale: guidance, got -1"),
        (["--num-inference-steps", "2", "--timesteps", "800"], "--num-inference-steps: steps, got 2, expected 1, as"),
        (["--num-inference-steps", "0"], r"--num-inference-steps: steps, got 0, expected 1\.\.1000"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        parse("c", "out", *arguments)


def test_a_preset_needs_no_checkpoint() -> None:
    plan = parse("out", "--preset", "hybrid-sd", "--scale", "tiny", "--dtype", "fp16", "--guidance-scale", "3")
    assert plan == PresetPlan("hybrid-sd", Path("out"), "tiny", "fp16", 3.0)
    export = plan.export_plan(Path("c"), {"unet_small": Path("s")})
    assert export == ExportPlan(
        Path("c"),
        Path("out"),
        (Added("unet_small", Path("s")),),
        dtype="fp16",
        guidance_scale=3.0,
        num_inference_steps=25,
    )
    facts = plan_facts(plan)
    assert facts["models"]["unet_small"] == {"name": "unet-hybrid-sd-224m", "parameters_at_full_scale": 223938436}
    assert (facts["preset"], facts["scale"], facts["num_inference_steps"]) == ("hybrid-sd", "tiny", 25)


def test_a_plan_names_every_component_once() -> None:
    twice = (Added("unet_small", Path("d")), Added("unet_small", Path("e")))
    with pytest.raises(ArgumentError, match="a component given twice, got 'unet_small'"):
        ExportPlan(Path("c"), Path("o"), twice)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["out"], "CHECKPOINT: not given, expected CHECKPOINT OUT, or OUT --preset NAME"),
        (["out", "--preset", "sd9"], "--preset: no such preset, got 'sd9', expected one of bk-sdm-base, "),
        (["out", "--preset", "sd15", "--small", "s"], "unet_small: given beside --preset"),
        (
            ["out", "--preset", "sd15", "--lora", "l:2"],
            "--lora: given beside --preset",
        ),
        (["out", "--preset", "sd15", "--vae", "v"], "--vae: given beside --preset"),
        (["out", "--preset", "sd15", "--allow-pickle"], "--allow-pickle: given beside --preset"),
        (["out", "--preset", "sd15", "--solver", "tcd"], "--solver: given beside --preset"),
        (["out", "--preset", "sd15", "--solver-config", "shift=3"], "--solver-config: given beside --preset"),
        (["out", "--preset", "sd15", "--timesteps", "800"], "--timesteps: given beside --preset"),
        (["out", "--preset", "sd15", "--eta", "0"], "--eta: given beside --preset"),
        (
            ["out", "--preset", "hyper-sdxl-1step", "--num-inference-steps", "4"],
            "got 4, expected 1, as --timesteps",
        ),
        (["out", "--preset", "sd15", "--num-inference-steps", "0"], "--num-inference-steps: steps, got 0"),
    ],
)
def test_presets_that_cannot_be_used_are_named(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        parse(*arguments)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ArgumentError, match="--dtype: precision, got 'int8', expected fp32 or fp16"):
        ExportPlan(Path("c"), Path("o"), dtype="int8")  # type: ignore[arg-type]


def test_the_plan_is_shown_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from tandemrt.export.command import plan_facts\n"
        "from tandemrt.export.plan import Added, ExportPlan\n"
        "plan = ExportPlan(Path(sys.argv[1]), Path(sys.argv[2]), (Added('unet_small', Path(sys.argv[1])),))\n"
        "print(json.dumps(plan_facts(plan)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(done.stdout)
    assert list(facts["components"]) == ["text_encoder", "unet", "unet_small", "vae_decoder", "vae_encoder"]
    assert facts["latent"]["downsampling"] == 2
    assert facts["prediction_type"] == "epsilon"
    assert facts["spatial_multiple"] == 2
    assert not (tmp_path / "out").exists()


def test_the_plan_of_an_export_that_cannot_be_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists already"):
        plan_facts(ExportPlan(checkpoint, tmp_path))


def test_leave_to_unpickle_reaches_the_plan_and_warns(
    checkpoint: Path, half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []

    class Console:
        def progress(self, label: str, done: int, total: int) -> None: ...
        def line(self, text: str) -> None: ...
        def warn(self, text: str) -> None:
            warnings.append(text)

    monkeypatch.setattr(bundles, "export_bundle", lambda plan, progress: half_bundle)
    for arguments, expected in (((), 0), (("--allow-pickle",), 1)):
        run(parse(str(checkpoint), str(tmp_path / "out"), *arguments), Console())
        assert len(warnings) == expected
    assert "unpickling can run code" in warnings[0]


def test_a_run_reports_every_component(
    checkpoint: Path, tiny: Path, half_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Console:
        def progress(self, label: str, done: int, total: int) -> None: ...
        def line(self, text: str) -> None: ...
        def warn(self, text: str) -> None: ...

    monkeypatch.setattr(bundles, "export_bundle", lambda plan, progress: half_bundle)
    result = run(ExportPlan(checkpoint, half_bundle, (Added("vae_decoder_tiny", tiny),), force=True), Console())
    assert json.loads(json.dumps(result)) == result
    assert result["bundle"] == str(half_bundle)
    lines = list(summary(result))
    assert len(lines) == 1 + len(result["components"])
    assert "fp32 islands" in "".join(lines)
