"""Hybridiff's placement: step by step what the same staleness on diffusers' modules makes, and under the pipeline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tandemrt.engines.graph_files import read_graph, write_graph
from tandemrt.engines.stages import stage_graphs
from tandemrt.runtime import EngineError, Output, Pipeline, RequestError, traced
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.cli import main
from tandemrt.runtime.discrepancy import Taus
from tandemrt.runtime.hybridiff import Hybridiff, Stages
from tandemrt.runtime.placement import Parallel, Worker
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.solvers import compile_table
from tandemrt.runtime.stage_work import Pipelining
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.window import Window

from .small_denoisers import module
from .stale_reference import Reference, Units
from .tandem import LEAST_PSNR_DB, ROWS, WINDOW, build_stages, distance_db, require_window
from .test_stages_stale import STEPS, TOLERANCE, scheduler_of, texts

PROMPT = "a red circle left of a blue square on a white background"
ASKED: dict[str, Any] = {"prompt": PROMPT, "seed": 7, "num_inference_steps": ROWS, "guidance_scale": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stages", "stride", "time_shift"),
    [("sd15", 2, 1, False), ("bk-sdm", 4, 1, True), ("sdxl", 2, 2, False), ("sd3", 4, 2, False)],
)
def test_the_sampler_reaches_the_references_latents(
    exported: Callable[[str], Path], tmp_path: Path, family: str, stages: int, stride: int, time_shift: bool
) -> None:
    window = Window(Taus(l_slope=2, eps_slope=0.05, k=5, tau_cap=3), Pipelining(stages, stride, time_shift))
    branches, target, scheduler = texts(family), parse_target("onnxruntime:cpu"), scheduler_of(family)
    table = compile_table(type(scheduler).__name__, dict(scheduler.config), STEPS)
    plan = Plan(table, ("unet",) * STEPS, (True,) * STEPS, 3.0, placement="hybridiff", window=window)
    whole = open_session(exported(family), target, threads=1)
    made = stage_graphs(read_graph(exported(family)), stages)
    folder = exported(family).parent
    parts = [
        open_session(write_graph(one.model, tmp_path / str(one.stage.index), folder), target, threads=1) for one in made
    ]
    conditioning = {"unet": Conditioning(branches[1], branches[0])}
    worker = Worker(plan, {"unet": whole}, conditioning)
    placed = Hybridiff(plan, window, Parallel(worker, worker), Stages("unet", whole.inputs, parts), conditioning)
    latent = np.random.default_rng(9).standard_normal((1, 16 if family == "sd3" else 4, 16, 8)).astype(np.float32)
    given = [{name: torch.from_numpy(array) for name, array in branch.items()} for branch in branches]
    cuts = [one.stage.begins for one in made[1:]]
    with torch.no_grad():
        units = Units(module(family), torch.from_numpy(latent), given[0], cuts)
    reference = Reference(units, (given[0], given[1]), window.pipelining, window.taus, plan.guidance_scale)
    sampler = Sampler(plan, placed, lambda: latent)
    state, rows = sampler.begin(latent), []
    expected = reference.steps(scheduler_of(family), torch.from_numpy(latent))
    for row, (_, wanted) in zip(sampler.run(state), expected, strict=True):
        assert np.abs(state.latents - wanted.numpy()).max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
        rows.append(row.guidance)
    ran = plan.having_run(rows)
    assert [row.discrepancy for row in rows if row.guided] == pytest.approx(reference.log, rel=1e-4)
    assert ran.taus == (reference.tau1, (reference.tau1 or 0) + 5)
    assert [row.placement for row in rows].count("filling") == 1
    assert {row.placement for row in rows} == {"parallel", "filling", "pipelined"} | (
        {"held"} if stride == 2 else set()
    )
    assert not any(row.guided for row in rows if row.placement != "parallel")


@pytest.fixture(scope="module")
def cache(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of two stages and four of the shapes family's large denoiser. Not to be written to."""
    folder = tmp_path_factory.mktemp("stages")
    for target, count in (("onnxruntime:cpu", 2), ("onnxruntime:cpu", 4), ("openvino:cpu", 2)):
        build_stages(shapes_bundle, folder, "unet", count, target)
    return folder


@pytest.fixture
def painted(shapes_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))

    def paint(target: str = "onnxruntime:cpu", **arguments: Any) -> Output:
        with Pipeline.open(shapes_bundle, target, threads=2) as pipeline:
            return pipeline(**{**ASKED, "output_type": "np", **arguments})

    return paint


Painted = Callable[..., Output]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_a_pipeline_paints_through_the_window(painted: Painted, target: str) -> None:
    whole = painted(target, placement="parallel", num_images_per_prompt=2)
    made = [whole]
    for stages, stride, time_shift in ((2, 1, False), (2, 2, True), (4, 1, False), (4, 2, False)):
        if stages == 4 and target == "openvino:cpu":
            continue
        config = {**WINDOW, "model_n": stages, "stride": stride, "time_shift": time_shift}
        asked = {"placement": "hybridiff", "placement_config": config, "num_images_per_prompt": 2}
        out = painted(target, **asked)
        require_window(out, whole, stride)
        assert min(distance_db(out, other) for other in made) > 15
        assert max(distance_db(out, other) for other in made) < LEAST_PSNR_DB
        made.append(out)
        if target == "openvino:cpu":
            assert distance_db(out, painted(**asked)) >= LEAST_PSNR_DB


@pytest.mark.slow
def test_the_timeline_names_stages_and_their_text(painted: Painted, tmp_path: Path) -> None:
    with traced(tmp_path / "trace.json") as trace:
        painted(placement="hybridiff", placement_config=WINDOW)
    calls = Counter(event["name"] for event in trace.events if event["name"].startswith("model unet"))
    assert calls == {
        "model unet (conditional)": 3,
        "model unet (unconditional)": 3,
        # The first stage's text is the unconditional one; the row that fills runs both.
        "model unet, stage 1 of 2 (unconditional)": 3,
        "model unet, stage 1 of 2 (conditional)": 1,
        "model unet, stage 2 of 2 (conditional)": 3,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_inference_steps": 20}, Exception, r"tau_cap \+ k: the window's last step, of 20 from 0 on, got 20"),
        ({"placement_config": {**WINDOW, "model_n": 3}}, EngineError, "unet.*--stages 3"),
        ({"placement_config": {**WINDOW, "model_n": 5}}, Exception, r"model_n: stages of a pipeline, got 5"),
        ({"placement_config": {"slope": 1}}, RequestError, "placement_config: unknown key, got 'slope'"),
        ({"placement_config": {"k": 1.5}}, RequestError, "placement_config: k: type, got 1.5, expected a whole number"),
        ({"placement_config": {"time_shift": 1}}, RequestError, "placement_config: time_shift: type, got 1"),
        ({"placement_config": [1]}, RequestError, r"placement_config: type, got \[1\]"),
        ({"guidance_scale": 1.0}, RequestError, "placement: rows that hybridiff cannot run, got '6 unguided ones"),
        ({"guidance": "adaptive"}, RequestError, "placement: rows that hybridiff cannot run.*adaptive guidance"),
        ({"steps": {"unet": 3, "unet_small": 3}, "num_inference_steps": None}, RequestError, "unet, unet_small"),
        ({"placement": "parallel"}, RequestError, "placement_config: given without a placement that has any"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    shapes_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, error: Any, words: str
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    given = {**ASKED, "placement": "hybridiff", "placement_config": WINDOW, **arguments}
    if "num_inference_steps" in arguments and arguments["num_inference_steps"] == 20:
        given["placement_config"] = None
    with Pipeline.open(shapes_bundle, threads=2) as pipeline:
        with pytest.raises(error, match=words):
            pipeline.stream(**given)
        assert not pipeline._models._sessions


@pytest.mark.slow
def test_the_command_line_writes_what_paints_it_again(
    shapes_bundle: Path,
    cache: Path,
    painted: Painted,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    window = [part for name, value in WINDOW.items() for part in ("--placement-config", f"{name}={value}")]
    steps = ["--num-inference-steps", str(ROWS), "--guidance-scale", "2", "--seed", "7", "--threads", "2"]
    common = ["generate", str(shapes_bundle), "--prompt", PROMPT, *steps, "--output-dir", str(tmp_path), "--json"]
    assert main([*common, "--placement", "hybridiff", *window]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert image["taus"] == [2, 4]
    assert len(image["guidance"]) == ROWS
    with Image.open(image["path"]) as picture:
        request = json.loads(picture.text["request"])  # type: ignore[attr-defined]
        again = painted(**request, output_type="pil").images[0]
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(again))
