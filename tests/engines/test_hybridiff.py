"""Hybridiff's placement under the pipeline: pictures, reports, refusals, the command line."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tandemrt.engines.composed import composed, composed_stages
from tandemrt.runtime import CancelledError, EngineError, Output, Pipeline, PlanError, RequestError, models, traced
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.stage_engines import find_stages
from tandemrt.runtime.variant import PLAIN

from ..runtime.engine_writing import write_engine, write_engines
from ..runtime.stand_in_gpus import stand_in
from ..runtime.test_allocation import peaks_bytes
from ..runtime.test_concurrency import at_once
from .tandem import LEAST_PSNR_DB, PLACED, ROWS, WINDOW, build_stages, distance_db, require_window

PROMPT = "a red circle left of a blue square on a white background"
ASKED: dict[str, Any] = {"prompt": PROMPT, "seed": 7, "num_inference_steps": ROWS, "guidance_scale": 2.0}


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
        (
            {"num_inference_steps": 20, "placement_config": None},
            PlanError,
            r"tau_cap \+ k: the window's last step, of 20 from 0 on, got 20",
        ),
        ({"placement_config": {**WINDOW, "model_n": 3}}, EngineError, "unet.*--stages 3"),
        ({"placement_config": {**WINDOW, "model_n": 5}}, PlanError, r"model_n: stages of a pipeline, got 5"),
        ({"placement_config": {"slope": 1}}, RequestError, "placement_config: unknown key, got 'slope'"),
        ({"placement_config": {"k": 1.5}}, RequestError, "placement_config: k: type, got 1.5, expected a whole number"),
        ({"placement_config": {"time_shift": 1}}, RequestError, "placement_config: time_shift: type, got 1"),
        ({"placement_config": [1]}, RequestError, r"placement_config: type, got \[1\]"),
        ({"guidance_scale": 1.0}, RequestError, r"hybridiff cannot run \(6 unguided of 6\)"),
        ({"guidance": "adaptive"}, RequestError, r"hybridiff cannot run \(adaptive guidance\)"),
        (
            {"steps": {"unet": 3, "unet_small": 3}, "num_inference_steps": None},
            RequestError,
            r"run \(denoisers unet and unet_small\)",
        ),
        ({"placement": "parallel"}, RequestError, "placement_config: given without a placement that has any"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    shapes_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, error: Any, words: str
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    given = {**ASKED, "placement": "hybridiff", "placement_config": WINDOW, **arguments}
    with Pipeline.open(shapes_bundle, threads=2) as pipeline:
        with pytest.raises(error, match=words):
            pipeline.stream(**given)
        assert not pipeline._models._sessions


@pytest.fixture(scope="module")
def pipe(shapes_bundle: Path, cache: Path) -> Iterator[Pipeline]:
    with Pipeline.open(shapes_bundle, threads=2, cache=cache) as pipeline:
        yield pipeline


def in_window(**config: Any) -> dict[str, Any]:
    return {**ASKED, "placement": "hybridiff", "placement_config": {**WINDOW, **config}, "output_type": "latent"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"num_images_per_prompt": 3}, {"height": 96}])
def test_stages_without_a_profile_for_the_latents_are_refused_before_the_run(
    shapes_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, int]
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    words = r"unet: no engine .*stage 1 of 2.* has no profile for this call: .* is outside .*--stages 2 --profile"
    with Pipeline.open(shapes_bundle, "openvino:cpu", threads=2) as pipeline:
        with pytest.raises(EngineError, match=words):
            pipeline.stream(**in_window(), **more)
        assert not pipeline._models._sessions


@pytest.mark.slow
def test_stages_that_turn_out_not_to_fit_are_told_before_the_first_row(
    shapes_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the text is longer than a profile takes, which the latents do not show."""
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    monkeypatch.setattr(models, "find_stages", lambda *asked, **at: find_stages(*asked[:-1], (1, 4, 8, 8), **at))
    with Pipeline.open(shapes_bundle, "openvino:cpu", threads=2) as pipeline:
        stream = pipeline.stream(**in_window(), num_images_per_prompt=3)
        with pytest.raises(EngineError, match=r"unet: no engine .*stage 1 of 2.* has no profile for this call"):
            next(stream)


@pytest.mark.slow
def test_stages_share_the_threads_and_take_two_calls_where_there_are_two(
    shapes_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    with Pipeline.open(shapes_bundle, "openvino:cpu", threads=2) as pipeline:
        for stride, expected in ((1, {((0, 2), 2, 2), ((1, 2), 1, 1)}), (2, {((0, 2), 2, 2), ((1, 2), 2, 2)})):
            pipeline._models._sessions.clear()
            pipeline(**in_window(stride=stride))
            opened = pipeline._models._sessions
            assert {(made_of.stage, *rest) for _, made_of, _, *rest, _ in opened if made_of.stage} == expected
        for (_, _, streams, _), loader in pipeline._models._loaders.items():
            for session in loader._loaded.values():
                assert session._compiled.get_property("NUM_STREAMS") == streams  # type: ignore[attr-defined]


@pytest.mark.slow
def test_stages_have_the_gpu_of_their_text(
    shapes_bundle: Path, painted: Painted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins for two GPUs, to which a window of stages is the same picture as on the CPU."""
    bundle, asked = Bundle.open(shapes_bundle), in_window(stride=2)
    write_engines(tmp_path, shapes_bundle, "sm89", "text_encoder", "unet")
    for variant in composed_stages(bundle, "unet", PLAIN, 2):
        model = composed(bundle.model_path("unet"), variant, "unet")
        onnx.load_external_data_for_model(model, str(bundle.model_path("unet").parent))
        write_engine(tmp_path, bundle, "unet", "sm89", model, variant)
    expected = painted(**asked).latents
    for devices, kind in (((0, 1), "direct"), (None, "DeviceToDevice")):
        gpus = stand_in(monkeypatch, "sm89", "sm89")
        with Pipeline.open(shapes_bundle, "tensorrt-rtx:sm89", cache=tmp_path, devices=devices) as pipeline:
            for _ in range(2):  # the second one on what the first one bound
                out = pipeline(**asked)
                np.testing.assert_allclose(out.latents, expected, atol=1e-4)
        assert [row.placement for row in out.plan.ran] == PLACED[2]
        ran = {one.variant: one.gpu for one in out.timings.ran_on["unet"] if "stage" in one.variant}
        assert [ran[name] for name in sorted(ran)] == ([1, 0] if devices else [0, 0])
        # What stages hand on stays on the GPUs.
        assert gpus.copied[kind] > gpus.copied["DeviceToHost"] + gpus.copied["HostToDevice"]
        assert gpus.wrong == []


@pytest.mark.slow
def test_threads_of_requests_paint_what_serial_ones_paint(
    shapes_bundle: Path, cache: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[Any, ...]] = []
    jobs = [{**in_window(**config), "seed": seed} for config in ({}, {"stride": 2}, {"model_n": 4}) for seed in (7, 8)]
    serial = [pipe(**job).latents for job in jobs]
    monkeypatch.setattr(
        models, "find_stages", lambda *asked, **at: looked.append(asked[2:]) or find_stages(*asked, **at)
    )
    with Pipeline.open(shapes_bundle, threads=2, cache=cache) as pipeline:
        together = at_once([lambda job=job: pipeline(**job).latents for job in jobs * 2])
    assert sorted((len(targets), shape) for targets, shape in looked) == [(2, (1, 4, 8, 8)), (4, (1, 4, 8, 8))]
    for index, made in enumerate(together):
        np.testing.assert_array_equal(made, serial[index % len(serial)])
    assert len({made.tobytes() for made in serial}) == len(serial)


@pytest.mark.slow
def test_cancelling_in_the_window_leaves_the_pipeline_usable(pipe: Pipeline) -> None:
    asked = in_window()
    expected = pipe(**asked).latents
    stream, before = pipe.stream(**asked), set(threading.enumerate())
    for event in stream:
        if event.timing.guidance.placement == "pipelined":
            stream.cancel()
            break
    with pytest.raises(CancelledError, match="after row 4 of 6"):
        next(stream)
    assert not set(threading.enumerate()) - before
    np.testing.assert_array_equal(pipe(**asked).latents, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_no_row_of_the_window_allocates(pipe: Pipeline, stride: int) -> None:
    stream = pipe.stream(**in_window(stride=stride), num_images_per_prompt=4, height=128, width=128)
    peaks = peaks_bytes(stream)
    assert [row.placement for row in stream.result().plan.ran] == PLACED[stride]
    assert max(peaks) < stream.result().latents.nbytes


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
