"""What benchmarks of one question ask of those who paint, and tell of them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tandemrt.bench import cold_command, hybrid_command, onestep_command, run_command, vae_command
from tandemrt.bench.contenders import Answer, Contender
from tandemrt.bench.entrants import Work
from tandemrt.bench.published import opened
from tandemrt.bench.reports.schema import read_report
from tandemrt.bench.room import weights_of
from tandemrt.bench.rounds import Taken
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import BenchmarkError

from ..runtime.tiny_bundle import write_tiny_bundle

ORT = ["--target", "onnxruntime:cpu:fp32", "--threads", "1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    write_tiny_bundle(folder)
    return folder


def test_fresh_starts_paint_as_many_pictures_as_asked(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    def in_fresh(entrants: dict[str, Any], *_: object) -> None:
        jobs.extend(entrant.start.args[-1] for entrant in entrants.values())
        raise BenchmarkError("here", "seen")

    monkeypatch.setattr(cold_command, "in_fresh", in_fresh)
    assert main(["bench", "cold", str(bundle), *ORT, "--batch-size", "3", "--out", str(tmp_path)]) == 1
    (job,) = jobs
    assert (job["arguments"]["num_images_per_prompt"], job["pictures"]) == (3, 3)


@pytest.mark.parametrize(
    ("command", "asked", "painted"),
    [
        (vae_command, ["vae", "--latents", "3"], [5, 6, 7]),
        (onestep_command, ["onestep", "--steps", "unet:1", "--no-limits"], [5]),
    ],
)
def test_components_are_given_what_they_are_in_pictures_of_the_seeds_asked_for(
    command: ModuleType,
    asked: list[str],
    painted: list[int],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def in_fresh_process(_function: object, _work: object, _target: object, seeds: Iterable[int], _: Path) -> None:
        seen.extend(seeds)
        raise BenchmarkError("here", "seen")

    monkeypatch.setattr(command, "in_fresh_process", in_fresh_process)
    kind, *rest = asked
    assert main(["bench", kind, str(bundle), *ORT, *rest, "--seed", "5", "--out", str(tmp_path)]) == 1
    assert seen == painted


def test_a_component_that_returns_nan_is_told(bundle: Path, tmp_path: Path) -> None:
    sample = np.full((1, 1, 4, 8, 8), np.nan, np.float32)
    text = np.zeros((1, 1, 12, 8), np.float32)
    np.savez(tmp_path / "unet.npz", sample=sample, timestep=np.ones((1, 1), np.float32), encoder_hidden_states=text)
    job = {"bundle": str(bundle), "component": "unet", "target": ORT[1], "threads": 1, "cache": str(tmp_path)}
    contender = Contender("unet", sys.executable, "component.py", {**job, "inputs": str(tmp_path / "unet.npz")})
    contender.opened()
    with pytest.raises(BenchmarkError, match="unet: ValueError: returned NaN or Inf in "):
        contender.painted(0, {}, tmp_path / "picture.npy")
    contender.close()


def test_one_step_on_a_further_target_that_fails_is_told(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ("text_encoder", "unet", "vae_decoder")
    figures = {"total_s": 1.0, "call_s": 0.5, "peak_mib": 9.0, **{f"{name}_mb": 1.0 for name in models}}
    took = Answer(figures, dict.fromkeys(models, "graph"))

    def in_rounds(entrants: Iterable[str], *_: object) -> dict[str, Taken]:
        failing = "tandemrt onnxruntime:cpu"
        return {name: Taken(failed="no room") if name == failing else Taken(rounds=[took]) for name in entrants}

    monkeypatch.setattr(onestep_command, "in_fresh_process", lambda *_: models)
    monkeypatch.setattr(onestep_command, "in_rounds", in_rounds)
    asked = ["bench", "onestep", str(bundle), *ORT, "--no-limits", "--target", "onnxruntime:cpu", "--steps", "unet:1"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    first, further = read_report(tmp_path / "report.json").sections
    assert [row.figures["call"].median for row in first.rows] == [500.0, 500.0, 500.0, 1000.0]
    assert [row.failed for row in further.rows] == ["", "", "", "no room"]
    assert ["share" in row.figures for row in (*first.rows, *further.rows)] == [True] * 3 + [False] * 5


def test_a_peer_of_other_weights_is_told_first(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ("text_encoder", "unet", "vae_decoder")
    figures = {"total_s": 1.0, "host_s": 0.1, "peak_mib": 9.0, **{f"{name}_mb": 1.0 for name in models}}
    took = Answer(figures, dict.fromkeys(models, "graph"))

    def in_rounds(entrants: Iterable[str], *_: object) -> dict[str, Taken]:
        words = {"precision": "float32"}
        return {name: Taken(opened=Answer({}, words), rounds=[took], psnr_db=[9.5]) for name in entrants}

    monkeypatch.setattr(run_command, "in_rounds", in_rounds)
    asked = ["bench", str(bundle), *ORT, "--no-limits", "--peer", "diffusers", "--rounds", "1", "--out", str(tmp_path)]
    assert main(asked) == 0
    told = read_report(tmp_path / "report.json").caveats[0]
    assert told == "diffusers paints another picture than tandemrt onnxruntime:cpu:fp32 (9.5 dB): " + (
        "are its weights the bundle's?"
    )


def test_the_load_is_that_before_a_preset_is_exported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = [0.25]

    def exported(*_: object) -> Path:
        load[0] = 9.0
        shutil.copytree(bundle, tmp_path / "sd15")
        return tmp_path

    monkeypatch.setattr("tandemrt.bench.published.preset_bundle", exported)
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    parser = argparse.ArgumentParser()
    run_command.add_arguments(parser)
    given = parser.parse_args(["--preset", "sd15", *ORT, "--cache", str(tmp_path), "--out", str(tmp_path / "out")])
    reporter: Any = SimpleNamespace(progress=None)
    watch = opened(run_command.plan_from_arguments(given).shared, reporter).watch
    assert watch.machine().load_average == (0.25, 9.0)
    monkeypatch.setattr("tandemrt.bench.machine.clock_mhz", lambda: 1234.0)
    for _ in range(2):
        with watch.probes.turn(1):
            pass
    assert watch.machine().clock_mhz == (1234.0, 1234.0)


def test_room_for_both_denoisers_is_asked_for(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def in_ways(work: Work, *_: object) -> None:
        seen.append(work.weights)
        raise BenchmarkError("here", "seen")

    monkeypatch.setattr(hybrid_command, "in_ways", in_ways)
    asked = ["bench", "hybrid", str(bundle), *ORT, "--steps", "4", "--points", "0", "--out", str(tmp_path)]
    assert main(asked) == 1
    painted = ("text_encoder", "unet", "unet_small", "vae_decoder")
    assert seen == [weights_of(Bundle.open(bundle), painted)]
