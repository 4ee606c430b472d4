"""`tandemrt calibrate quantize` on the tiny bundle and on the shapes family: what it makes, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tandemrt.calibrate import quantize_command, quantizers, ranges
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import PlanError

from ..runtime.tiny_bundle import resign, write_tiny_bundle

pytestmark = pytest.mark.usefixtures("cache")

TINY_PROMPTS = ("red", "blue red", "a red blue", "blue blue")
HELD_OUT = ("red red red", "blue a", "red a a", "blue red a")


def command(*words: object) -> list[str]:
    return [str(word) for word in ("calibrate", "quantize", *words)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny bundle, trajectories of it and prompts."""
    folder = tmp_path_factory.mktemp("quantize")
    write_tiny_bundle(folder / "bundle")
    (folder / "prompts.txt").write_text("\n".join(TINY_PROMPTS))
    (folder / "held-out.txt").write_text("\n".join(HELD_OUT))
    words = ("collect", folder / "bundle", "--prompts", folder / "prompts.txt", "--steps", 4, "--out", folder / "kept")
    assert main(["calibrate", *map(str, words)]) == 0
    return folder


def quantize(tiny: Path, out: Path, *words: object) -> int:
    judged = ("--prompts", tiny / "held-out.txt", "-n", 2, "--threads", 1)
    return main(command(tiny / "bundle", "--out", out, "--trajectories", tiny / "kept", *judged, *words))


def test_int8_is_published_with_what_it_took(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(tiny / "bundle")
    assert quantize(tiny, tmp_path / "out", "--component", "unet", "--observer", "minmax", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    made = Bundle.open(tmp_path / "out")
    assert told["digest"] == made.digest
    quantization = made.component("unet").quantization
    assert quantization is not None
    assert quantization.format == "int8"
    assert quantization.settings["observer"] == "minmax"
    assert quantization.float_model == before.manifest.files["unet/model.onnx"].sha256
    assert quantization.trajectories is not None
    (loss,) = quantization.losses
    assert (loss.min_psnr_db, loss.bundle, loss.prompts, loss.judged) == (None, before.digest, 2, 1)
    # The trajectories' seeds are 0 to 3.
    assert loss.seed == len(TINY_PROMPTS)
    assert loss.worst_psnr_db <= loss.psnr_db < 99
    assert 0 < loss.latent_error < 1
    assert 0 < loss.ssim < 1
    assert loss.painted == "unet 4, vae_decoder, 64x64, onnxruntime:cpu"
    assert made.component("unet_small") == before.component("unet_small")
    assert Bundle.open(tiny / "bundle") == before
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "unet is quantized: int8 in" in shown
    assert "2 held-out prompts, unet 4, vae_decoder, 64x64, onnxruntime:cpu" in shown
    speed = quantization.speed
    assert speed is not None
    assert (speed.target, speed.threads) == ("onnxruntime:cpu", 1)
    assert told["components"]["unet"]["speed"]["ratio"] == speed.ratio
    assert f"{speed.ratio:.2f} times as long ({speed.least_ratio:.2f} to {speed.most_ratio:.2f} in" in shown
    assert (": slower here" in shown) == (speed.ratio > 1)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "not compared with PyTorch: unet, which is quantized" in capsys.readouterr().out


def test_weights_need_no_trajectories(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (tiny / "bundle", "--out", tmp_path / "out", "--component", "unet", "--format", "int8-weights")
    assert main(command(*words, "--steps", 2)) == 0
    quantization = Bundle.open(tmp_path / "out").component("unet").quantization
    assert quantization is not None
    assert quantization.trajectories is None
    assert quantization.losses[0].painted.startswith("unet 2, ")
    # The empty prompt is not passed off as one that was held out.
    assert (quantization.losses[0].prompts, quantization.losses[0].held_out) == (1, False)
    told = capsys.readouterr().out
    assert "the empty prompt, as none were given, unet 2" in told
    assert "unet: a call takes " in told
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "the empty prompt, as none were given, unet 2" in shown
    assert "held-out" not in shown
    assert main(command(*words, "--steps", 2)) == 1
    for option in (("--column", "text"), ("-n", 2), ("--min-psnr", 30), ("--scorer", "json:loads")):
        assert main(command(*words, "--force", *option)) == 2
        assert f"{option[0]}: given without --prompts" in capsys.readouterr().err
    assert main(command(*words, "--steps", 3, "--force")) == 0
    assert main(command(tmp_path / "out", "--out", tmp_path / "again", *words[3:])) == 2


def test_a_component_that_ruins_pictures_is_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ruined = ("--component", "unet", "--observer", "percentile", "--percentile", 20)
    assert quantize(tiny, tmp_path / "out", *ruined) == 0
    told = capsys.readouterr().err
    assert "warning: unet: pictures of unet 4, vae_decoder are " in told
    assert "expected 30 dB and 0.9 or more. Try --min-psnr 30, which keeps" in told
    assert quantize(tiny, tmp_path / "asked", *ruined, "--min-psnr", 2) == 0
    assert "Try --min-psnr" not in capsys.readouterr().err


def test_calls_that_cannot_be_timed_cost_no_bundle(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a solver has no schedule of so few steps."""

    def failing(*given: Any) -> Any:
        raise PlanError("ddim: timestep 999", "the solver's coefficients are not finite")

    monkeypatch.setattr(quantize_command, "call_times", failing)
    words = (tiny / "bundle", "--out", tmp_path / "out", "--component", "unet", "--format", "int8-weights")
    assert main(command(*words, "--steps", 2)) == 0
    told = capsys.readouterr()
    assert "warning: calls were not timed: ddim: timestep 999: the solver's coefficients are not finite" in told.err
    assert "a call takes" not in told.out
    quantization = Bundle.open(tmp_path / "out").component("unet").quantization
    assert quantization is not None
    assert (quantization.speed, len(quantization.losses)) == (None, 1)


def test_the_bundle_itself_is_never_replaced(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.open(tiny / "bundle")
    assert quantize(tiny, tiny / "bundle", "--component", "unet", "--force") == 2
    assert "--out: the bundle that it is made of" in capsys.readouterr().err
    assert Bundle.open(tiny / "bundle") == before


def test_what_would_be_done_is_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tiny, tmp_path / "out", "--component", "unet", "--min-psnr", 20, "--print-plan", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["components"]["unet"]["painted"] == ["unet 4, vae_decoder"]
    assert told["budget"] == {"min_psnr_db": 20.0, "min_accuracy": None}
    assert (told["prompts"], told["search_prompts"]) == (2, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--keep", "nothing"), 2, "--keep: no such layer, got 'nothing', expected a layer or a pattern of unet"),
        (("--component", "vae_encoder"), 2, "--component: "),
        (("--component", "unet_large"), 2, "--component: no such component, got 'unet_large'"),
        (("--min-accuracy", "0.97x"), 2, "--min-accuracy: given without --scorer"),
        (("--min-accuracy", "2x"), 2, "--min-accuracy: not a share, got '2x', expected a share of the float"),
        (("--smoothing", "much"), 2, "--smoothing: not a number, got 'much'"),
        (("-n", "0"), 2, "-n: not usable, got 0"),
        (("-n", "5"), 2, "held-out.txt: prompts, got 4, expected -n 5. Give -n 4"),
        (
            ("-n", "3", "--min-psnr", "20"),
            2,
            "got 4, expected 6 or more: -n 3 to judge by, and as many to search",
        ),
        (("--min-psnr", "nan"), 2, "--min-psnr: out of range, got nan, expected decibels above 0, up to 99"),
        (("--min-psnr", "-3"), 2, "--min-psnr: out of range, got -3.0"),
        (("--min-psnr", "100"), 2, "--min-psnr: out of range, got 100.0"),
        (("--guidance-scale", "nan"), 2, "--guidance-scale: out of range, got nan"),
        (("--samples", "3"), 2, "--samples: how many, got 3, expected 4 or more"),
        (("--percentile", "99"), 2, "--percentile: given without --observer percentile"),
        (("--observer", "percentile", "--percentile", "0"), 2, "percentile: out of range, got 0.0"),
        (("--format", "int4-weights", "--observer", "mse"), 2, "--observer: of no use for int4-weights. Leave it out."),
        (("--format", "int8-weights", "--samples", "8"), 2, "--samples: of no use for int8-weights"),
        (("--format", "fp8", "--smoothing", "off"), 2, "--smoothing: of no use for fp8"),
        (("--tool", "nncf", "--observer", "mse"), 2, "--observer: of no use for int8 by nncf"),
        (("--format", "int8-weights", "--discard"), 2, "--discard: given without a budget. Give --min-psnr or"),
        (("--cache", "nowhere"), 2, "cache: not a folder that is there, got 'nowhere'"),
        (("--scorer", "json:nothing"), 2, "--scorer: no function nothing in json"),
        (
            ("--format", "fp8", "--component", "text_encoder"),
            2,
            "--component: cannot be quantized to fp8, got 'text_encoder, a text_encoder', expected one of unet",
        ),
        (("--format", "fp8"), 1, "unet: opset, got 18, expected 19 or newer, which has E4M3"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, told: str
) -> None:
    named = () if "--component" in words else ("--component", "unet")
    assert quantize(tiny, tmp_path / "out", *named, *words) == status
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_trajectories_have_to_fit(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out", "--component", "unet")
    assert main(command(tiny / "bundle", *out)) == 2
    assert "--trajectories: not given, and int8 needs them" in capsys.readouterr().err
    assert main(command(tiny / "bundle", *out, "--trajectories", tmp_path)) == 1
    assert "holds no trajectories" in capsys.readouterr().err
    assert quantize(tiny, tmp_path / "out", "--component", "unet", "--prompts", tiny / "prompts.txt") == 2
    assert "held out and calibrated with: 2 of them" in capsys.readouterr().err
    write_tiny_bundle(tmp_path / "other")

    def of_another(manifest: Any) -> Any:
        import msgspec  # noqa: PLC0415

        source = msgspec.structs.replace(manifest.components["unet"].source, sha256="1a" * 32)
        unet = msgspec.structs.replace(manifest.components["unet"], source=source)
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet": unet})

    resign(tmp_path / "other", of_another)
    assert main(command(tmp_path / "other", *out, "--trajectories", tiny / "kept")) == 1
    assert "trajectories of another bundle" in capsys.readouterr().err
    words = ("collect", tiny / "bundle", "--prompts", tiny / "prompts.txt", "-n", 2, "--rows", 1, "--steps", 4,
             "--denoiser", "unet", "--guidance-scale", 0, "--out", tmp_path / "few")  # fmt: skip
    assert main(["calibrate", *map(str, words)]) == 0
    assert main(command(tiny / "bundle", *out, "--trajectories", tmp_path / "few")) == 2
    assert "unet: samples, got 2, expected 4 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_samples_of_any_component_are_told_before_the_first_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("collect", tiny / "bundle", "--prompts", tiny / "prompts.txt", "-n", 3, "--steps", 4,
             "--denoiser", "unet", "--out", tmp_path / "few")  # fmt: skip
    assert main(["calibrate", *map(str, words)]) == 0
    monkeypatch.setattr(ranges, "GraphRun", None)
    assert main(command(tiny / "bundle", "--out", tmp_path / "out", "--trajectories", tmp_path / "few")) == 2
    assert "vae_decoder: samples, got 3, expected 4 or more. Collect from more prompts" in capsys.readouterr().err


def test_ranges_are_found_once(tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longest is kept by component: of those done before an interruption, whatever is made of it."""
    collected: list[str] = []
    stops = ["unet"]

    def counted(model: Path, *given: Any) -> ranges.Ranges:
        collected.append(model.parent.name)
        if model.parent.name in stops:
            raise KeyboardInterrupt
        return ranges.collect_ranges(model, *given)

    monkeypatch.setattr(quantizers, "collect_ranges", counted)
    words = ("--component", "text_encoder", "--component", "unet", "--force")
    assert quantize(tiny, tmp_path / "out", *words) == 130
    assert (collected, len(list(cache.glob("ranges/*")))) == (["text_encoder", "unet"], 1)
    stops.clear()
    assert quantize(tiny, tmp_path / "out", *words) == 0
    assert collected == ["text_encoder", "unet", "unet"]
    before = graphs_of(tmp_path / "out")
    assert quantize(tiny, tmp_path / "out", *words) == 0
    assert graphs_of(tmp_path / "out") == before
    stale = cache / "ranges" / f"{'0' * 64}.npz"
    stale.touch()
    for path in cache.glob("ranges/*"):
        os.utime(path, (0, 0))
    assert quantize(tiny, tmp_path / "out", *words, "--observer", "percentile", "--percentile", 50) == 0
    assert (len(collected), stale.exists()) == (3, False)
    assert graphs_of(tmp_path / "out") != before
    assert quantize(tiny, tmp_path / "out", *words, "--samples", 4) == 0
    assert collected[3:] == ["text_encoder", "unet"]
    for path in cache.glob("ranges/*"):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    assert quantize(tiny, tmp_path / "out", *words) == 0
    assert graphs_of(tmp_path / "out") == before
    assert quantize(tiny, tmp_path / "out", *words, "--discard") == 0
    assert collected[5:] == ["text_encoder", "unet"] * 2


def graphs_of(bundle: Path) -> dict[str, str]:
    """The digests of a bundle's files."""
    return {name: record.sha256 for name, record in Bundle.open(bundle).manifest.files.items()}
