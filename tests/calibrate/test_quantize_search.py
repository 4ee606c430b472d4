"""The search for the layers that a budget keeps, on the tiny bundle: what is measured, and that it is measured once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tandemrt.calibrate import grounds, quantize_job, quantize_search, quantizers, ranges, sensitivity
from tandemrt.calibrate.graph_runs import GraphRun
from tandemrt.calibrate.judged import Judge, Way
from tandemrt.calibrate.quantized import Quantized
from tandemrt.calibrate.quantizers import SWEPT_SAMPLES, Work
from tandemrt.calibrate.weights_only import WeightSettings, quantize_weights
from tandemrt.runtime import targets
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.manifest import Loss

from ..runtime.tiny_bundle import write_tiny_bundle

CALIBRATED = ("red", "blue red", "a red blue", "blue blue")
JUDGED, SEARCHED = ("red red red", "blue a"), ("red a a", "blue red a")
SEED = 5
EVERY = ("text_encoder", "unet", "vae_decoder")
UNMET = ("--min-psnr", "98")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny bundle, its trajectories and prompts."""
    folder = tmp_path_factory.mktemp("search")
    write_tiny_bundle(folder / "bundle")
    (folder / "prompts.txt").write_text("\n".join(CALIBRATED))
    (folder / "held-out.txt").write_text("\n".join((*JUDGED, *SEARCHED)))
    words = ("collect", folder / "bundle", "--prompts", folder / "prompts.txt", "--steps", 4, "--seed", SEED)
    assert main(["calibrate", *map(str, words), "--out", str(folder / "kept")]) == 0
    return folder


def quantize(tiny: Path, out: Path, *words: object, names: Iterable[str] = ("unet",)) -> int:
    named = [word for name in names for word in ("--component", name)]
    given = ("--out", out, "--trajectories", tiny / "kept", "--prompts", tiny / "held-out.txt", "--threads", 1)
    return main(["calibrate", "quantize", str(tiny / "bundle"), *map(str, (*given, *named, *words))])


class Watch:
    """What is measured meanwhile, until as much was painted as `stop_after`.

    painted: of every candidate the prompts and its graphs' bytes. compared: how many samples of a sweep.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.painted: list[tuple[tuple[str, ...], tuple[bytes, ...]]] = []
        self.compared, self.stop_after = 0, 1 << 30
        losses, difference = Judge.losses, sensitivity._difference

        def painted(judge: Judge, candidate: Bundle, ways: Iterable[Way]) -> dict[Way, Loss]:
            if len(self.painted) == self.stop_after:
                raise KeyboardInterrupt
            graphs = tuple(candidate.model_path(name).read_bytes() for name in EVERY)
            self.painted.append((judge.painting.prompts, graphs))
            return losses(judge, candidate, ways)

        def compared(found: Mapping[str, Any], meant: Mapping[str, Any]) -> float:
            self.compared += 1
            return difference(found, meant)

        monkeypatch.setattr(Judge, "losses", painted)
        monkeypatch.setattr(sensitivity, "_difference", compared)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Watch:
    return Watch(monkeypatch)


def found(cache: Path) -> dict[str, Any]:
    """What a search has kept of its measurements."""
    (path,) = cache.glob("quantize/*/found.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {key: facts for line in lines for key, facts in line.items()}


def test_every_candidate_is_painted_once(tiny: Path, tmp_path: Path, watch: Watch) -> None:
    assert quantize(tiny, tmp_path / "out", *UNMET, names=EVERY) == 1
    assert len(watch.painted) == len(set(watch.painted))
    # All of them quantized, each component alone, and then one and two layers kept: the others have one layer each.
    assert len(watch.painted) == 1 + len(EVERY) + 2
    assert {prompts for prompts, _ in watch.painted} == {SEARCHED}


def test_an_unmet_budget_names_the_nearest(
    tiny: Path, tmp_path: Path, watch: Watch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny, tmp_path / "out", *UNMET) == 1
    told = capsys.readouterr().err
    words = r"unet, with (\d) of 3 layers in floating point, the nearest: budget of psnr_db, got '(.*) dB', expected at"
    got = re.search(words, told)
    assert got is not None, told
    distances = [facts["psnr_db"] for facts in found(cache).values() if isinstance(facts, dict)]
    assert len(distances) == 3
    assert got[2] == f"{max(distances):.1f}"
    course = [
        f"searched with {kept} kept: {distance:.1f} dB, misses 98 dB\n" for kept, distance in enumerate(distances)
    ]
    assert all(line in told for line in course)
    assert distances.index(max(distances)) == int(got[1])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_search_goes_on_where_it_stopped(
    tiny: Path, tmp_path: Path, watch: Watch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch.stop_after = 2
    assert quantize(tiny, tmp_path / "out", *UNMET) == 130
    assert list(tmp_path.iterdir()) == []
    before = found(cache)
    # Both groups of the first split, and both of the worse one's: the worst layer alone is known by then.
    assert (len(watch.painted), watch.compared) == (2, 5 * SWEPT_SAMPLES)
    capsys.readouterr()
    watch.stop_after = 1 << 30
    assert quantize(tiny, tmp_path / "out", *UNMET) == 1
    assert f"goes on with {len(before)} things measured before" in capsys.readouterr().err
    assert len(watch.painted) == len(set(watch.painted)) == 3
    assert watch.compared == 5 * SWEPT_SAMPLES
    after = found(cache)
    assert {key: after[key] for key in before} == before
    assert quantize(tiny, tmp_path / "out", *UNMET) == 1
    assert (len(watch.painted), watch.compared) == (3, 5 * SWEPT_SAMPLES)
    assert quantize(tiny, tmp_path / "out", *UNMET, "--discard") == 1
    assert (len(watch.painted), watch.compared) == (6, 10 * SWEPT_SAMPLES)


def test_what_was_found_serves_another_budget_and_no_other_graph(tiny: Path, tmp_path: Path, watch: Watch) -> None:
    assert quantize(tiny, tmp_path / "out", *UNMET) == 1
    assert len(watch.painted) == 3
    assert quantize(tiny, tmp_path / "out", "--min-psnr", "97") == 1
    assert len(watch.painted) == 3
    assert quantize(tiny, tmp_path / "out", *UNMET, "--observer", "minmax") == 1
    assert len(watch.painted) == 6


def test_what_was_found_is_of_the_target_that_auto_means_and_of_this_machine(
    tiny: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize(tiny, tmp_path / "out", *UNMET) == 1
    assert len(watch.painted) == 3
    assert quantize(tiny, tmp_path / "out", *UNMET, "--target", "onnxruntime:cpu") == 1
    assert len(watch.painted) == 3
    monkeypatch.setattr(targets, "_automatic", lambda: targets.parse_target("openvino:cpu:fp32"))
    assert quantize(tiny, tmp_path / "out", *UNMET) == 1
    assert len(watch.painted) == 6
    monkeypatch.setattr(grounds, "usable_cpus", lambda: 1 << 20)
    assert quantize(tiny, tmp_path / "out", *UNMET, "--target", "onnxruntime:cpu") == 1
    assert len(watch.painted) == 9


def test_prompts_and_seeds_that_judge_are_not_those_of_the_search_nor_of_the_calibration(
    tiny: Path, tmp_path: Path, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny, tmp_path / "out", "--min-psnr", "10") == 0
    course = re.findall(r"(searched|judged) with 0 kept: ([\d.]+) dB, holds 10 dB\n", capsys.readouterr().err)
    assert [prompts for prompts, _ in watch.painted] == [SEARCHED, JUDGED]
    assert watch.painted[0][1] == watch.painted[1][1]
    quantization = Bundle.open(tmp_path / "out").component("unet").quantization
    assert quantization is not None
    (loss,) = quantization.losses
    assert [how for how, _ in course] == ["searched", "judged"]
    assert course[1][1] == f"{loss.psnr_db:.1f}"
    searched = quantization.settings["searched_with"]
    calibrated, after = range(SEED, SEED + len(CALIBRATED)), SEED + len(CALIBRATED)
    assert (loss.seed, searched["seed"]) == (after, after + len(JUDGED))
    assert calibrated.stop == after
    assert (loss.prompts, searched["prompts"], loss.judged) == (2, 2, 1)
    assert loss.prompts_sha256 != searched["prompts_sha256"]


def test_more_is_kept_where_the_judged_prompts_miss_the_budget(
    tiny: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What holds with the search's prompts need not hold with others."""
    holds = quantize_search._holds
    asked: list[Sequence[Loss]] = []

    def at_the_fourth_time(losses: Iterable[Loss]) -> bool:
        asked.append(tuple(losses))
        return len(asked) in (1, 4) and holds(asked[-1])

    monkeypatch.setattr(quantize_search, "_holds", at_the_fourth_time)
    assert quantize(tiny, tmp_path / "out", "--min-psnr", "10") == 0
    assert [prompts for prompts, _ in watch.painted] == [SEARCHED, JUDGED, JUDGED, JUDGED]
    quantization = Bundle.open(tmp_path / "out").component("unet").quantization
    assert quantization is not None
    assert (quantization.losses[0].judged, quantization.settings["kept_for_the_budget"]) == (3, 2)
    assert quantization.layers == 1
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert len(quantization.kept) == 2
    assert f"unet keeps in floating point: {', '.join(quantization.kept)}\n" in capsys.readouterr().out


def test_the_worst_of_each_figure_is_told() -> None:
    told = [
        Loss(psnr_db=psnr_db, worst_psnr_db=psnr_db, ssim=0.9, latent_error=0.1, accuracy=accuracy, float_accuracy=0.96,
             min_psnr_db=30, min_accuracy=0.97, bundle="", prompts=2, prompts_sha256="", seed=0, painted="")
        for psnr_db, accuracy in ((28.9, 0.96), (40.0, 0.94))
    ]  # fmt: skip
    assert quantize_search.reached(told) == (
        "28.9 dB, misses 30 dB; accuracy 0.940, holds 0.9312, of the float bundle's 0.960"
    )


def test_nothing_is_published_where_no_number_holds_with_the_judged_prompts(
    tiny: Path, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[None] = []
    monkeypatch.setattr(quantize_search, "_holds", lambda losses: bool(asked.append(None) or len(asked) == 1))
    assert quantize(tiny, tmp_path / "out", "--min-psnr", "50") == 1
    assert [prompts for prompts, _ in watch.painted] == [SEARCHED, JUDGED, JUDGED, JUDGED]
    assert re.search(r"unet, with \d of 3 layers in floating point, the nearest: budget", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_backends_that_are_not_installed_are_not_needed(
    tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.distributions

    def without_openvino(**given: Any) -> Iterable[metadata.Distribution]:
        return () if given.get("name") == "openvino" else real(**given)

    monkeypatch.setattr(metadata, "distributions", without_openvino)
    monkeypatch.setattr(quantize_job, "distributions", without_openvino)
    assert quantize(tiny, tmp_path / "out", "--target", "onnxruntime:cpu", "--min-psnr", "10") == 0
    (ledger,) = cache.glob("quantize/*/found.jsonl")
    ground = json.loads(ledger.read_text().splitlines()[0])
    assert {"tandemrt", "onnxruntime"} <= ground["versions"].keys()
    assert "openvino" not in ground["versions"]


def test_nncf_needs_no_ranges_of_ours_without_a_budget(
    tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(model: Path, samples: Any, out: Path, settings: Any) -> Quantized:
        return quantize_weights(model, out, WeightSettings(8))

    monkeypatch.setattr(quantizers, "require_nncf", lambda: None)
    monkeypatch.setattr(quantizers, "quantize_nncf", made)
    monkeypatch.setattr(ranges, "GraphRun", None)
    assert quantize(tiny, tmp_path / "out", "--tool", "nncf") == 0
    # Without a budget there is nothing to go on with, and no other run to wait for.
    assert list(cache.iterdir()) == []


def test_calibration_runs_use_so_many_threads_and_samples(
    tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int | None] = []
    asked: list[int] = []

    class Watched(GraphRun):
        def __init__(
            self, model: Any, folder: Path, where: str, threads_: int | None = None, left_out: Sequence[str] = ()
        ) -> None:
            threads.append(threads_)
            super().__init__(model, folder, where, threads_, left_out)

    def watched(**given: Any) -> Work:
        samples = given["samples"]
        return Work(**{**given, "samples": lambda most: asked.append(most) or samples(most)})

    for module in (ranges, sensitivity):
        monkeypatch.setattr(module, "GraphRun", Watched)
    monkeypatch.setattr(quantize_search, "Work", watched)
    assert quantize(tiny, tmp_path / "out", *UNMET, "--samples", 6) == 1
    assert threads == [1, 1]
    # As many as calibrate at most, although a sweep would take more.
    assert SWEPT_SAMPLES > 6
    assert set(asked) == {6}
