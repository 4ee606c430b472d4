"""Where the branches of guidance run: the same picture everywhere, at once where asked, refusals before the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import CancelledError, ExecutionError, Output, Pipeline, RequestError, TargetError
from tandemrt.runtime.backends.base import Lying
from tandemrt.runtime.cli import main
from tandemrt.runtime.discrepancy import relative_mae
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.placement import Batched, Crew, Parallel, Placed, Sequential, Worker, refusal
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.rng import new_generator
from tandemrt.runtime.sampler import SampledRow, Sampler
from tandemrt.runtime.solvers import SOLVERS
from tandemrt.runtime.stage_parts import Part
from tandemrt.runtime.state import State
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.window import require_window_rows

from ..interop.picture import psnr_db
from .recorded import Recorded
from .test_sampler import SHAPE, Denoiser, conditioning, plan
from .tiny_bundle import write_tiny_bundle
from .tiny_families import write_tiny_control, write_tiny_editing, write_tiny_lcm, write_tiny_sd3, write_tiny_sdxl

TARGETS = ("onnxruntime:cpu", "openvino:cpu")
PLACEMENTS = ("batched", "sequential", "parallel")
LEAST_PSNR_DB = 60.0
HYBRID: dict[str, Any] = {"steps": {"unet": 3, "unet_small": 3}, "num_inference_steps": None}

Paint = Callable[..., Output]


@pytest.fixture(scope="module")
def paint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paint]:
    """Paints with a family's bundle on a target, each of them opened once, on two threads."""
    with ExitStack() as stack:

        @cache
        def folder(write: Callable[[Path], Manifest]) -> Path:
            made = tmp_path_factory.mktemp("family") / "bundle"
            write(made)
            return made

        @cache
        def pipeline(bundle: Path, target: str) -> Pipeline:
            return stack.enter_context(Pipeline.open(bundle, target, threads=2))

        def paint(family: Path | Callable[[Path], Manifest], target: str, **arguments: Any) -> Output:
            bundle = family if isinstance(family, Path) else folder(family)
            defaults = {"prompt": "red blue", "seed": 7, "num_inference_steps": 4, "output_type": "np"}
            return pipeline(bundle, target)(**{**defaults, **arguments})

        yield paint


def require_the_same(paint: Paint, family: Any, target: str, **arguments: Any) -> None:
    """Every placement paints what `batched` does, and its report says so."""
    expected = paint(family, target, **arguments)
    assert np.stack(expected.images).std() > 0.01
    for placement in PLACEMENTS[1:]:
        out = paint(family, target, **arguments, placement=placement)
        assert psnr_db(np.stack(out.images), np.stack(expected.images)) >= LEAST_PSNR_DB
        assert out.plan.placement == placement
        for one, other in zip(out.timings.rows, expected.timings.rows, strict=True):
            assert one.guidance.placement == placement
            assert (one.guidance.guided, one.guidance.why) == (other.guidance.guided, other.guidance.why)
            if one.guidance.guided:
                np.testing.assert_allclose(one.guidance.discrepancy, other.guidance.discrepancy, rtol=1e-3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"flow_euler"}))
def test_every_solver_paints_the_same_picture(paint: Paint, solver: str, target: str) -> None:
    require_the_same(paint, write_tiny_bundle, target, solver=solver, **HYBRID)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("write", [write_tiny_sdxl, write_tiny_sd3, write_tiny_lcm], ids=["sdxl", "sd3", "lcm"])
def test_every_family_paints_the_same_picture(paint: Paint, write: Any, target: str) -> None:
    names = {write_tiny_sd3: ("transformer", "transformer_small"), write_tiny_lcm: ("unet", "unet_plain")}
    hybrid = {"steps": dict.fromkeys(names.get(write, ("unet", "unet_small")), 3), "num_inference_steps": None}
    for more in ({}, {"guidance_interval": (0.0, 0.5)}, {"negative_prompt": "blue"}):
        require_the_same(paint, write, target, num_images_per_prompt=2, **hybrid, **more)


@pytest.mark.parametrize("target", TARGETS)
def test_the_trained_family_paints_the_same_picture(paint: Paint, shapes_bundle: Path, target: str) -> None:
    prompt = "a red circle left of a blue square on a white background"
    hybrid = {"steps": {"unet": 3, "unet_small": 3}, "num_inference_steps": None}
    require_the_same(paint, shapes_bundle, target, prompt=prompt, guidance_interval=(0.0, 0.8), **hybrid)


@pytest.mark.parametrize("target", TARGETS)
def test_controlnets_and_inpainting_paint_the_same_picture(paint: Paint, target: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    steered: dict[str, Any] = {
        "control_image": {"canny": image, "depth": image[::-1]},
        "control_guidance_start": {"canny": 0.1, "depth": 0.0},
        "control_guidance_end": {"canny": 0.7, "depth": 0.4},
        "guidance_interval": (0.0, 0.5),
    }
    steps: dict[str, Any] = {"steps": {"unet": 5, "unet_free": 2}, "num_inference_steps": None}
    require_the_same(paint, write_tiny_control, target, prompt=["red", "blue"], **steered, **steps)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    steps = {"steps": {"unet_inpaint": 4}, "num_inference_steps": None}
    require_the_same(paint, write_tiny_editing, target, image=image, mask_image=mask, strength=0.7, **steps)


def test_what_each_call_is_given(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    with Pipeline.open(tmp_path / "bundle", threads=2) as pipeline:
        recorded = Recorded(pipeline)
        for placement in PLACEMENTS:
            given = recorded.given(num_images_per_prompt=2, num_inference_steps=2, placement=placement)
            rows = [len(one["sample"]) for one in given]
            assert rows == ([4, 4] if placement == "batched" else [2, 2, 2, 2])
        assert len(recorded.given(placement="parallel", guidance_scale=1.0)) == 1


def test_a_sample_that_lies_where_a_model_runs_is_refused_by_one_that_is_handed_nothing() -> None:
    compiled, binding = plan(2), Denoiser().bind({"sample": SHAPE})
    worker = Worker(compiled, {"unet": Denoiser()}, conditioning(compiled))
    lying, stage = Lying(binding, "out_sample", SHAPE), Part("stage 1", binding, binding.inputs["sample"], "sample")
    for label, give in (
        (r"unet \(both\)", lambda: Batched(worker).predict(0, lying, guided=True)),
        (r"unet \(conditional\)", lambda: Sequential(worker).predict(0, lying, guided=True)),
        ("stage 1", lambda: stage.give(lying, 0.0, {})),
    ):
        with pytest.raises(ExecutionError, match=f"{label}: inputs handed to a backend that .* got 'sample'"):
            give()


class MeetingDenoiser(Denoiser):
    """Two calls of it must run at once: each waits for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(2)

    def bind(self, input_shapes: Mapping[str, tuple[int, ...]]) -> Any:
        binding = super().bind(input_shapes)
        run = binding.run

        def meet() -> None:
            self.meeting.wait(timeout=10)
            run()

        binding.run = meet
        return binding


def run(compiled: Plan, placed: Placed) -> tuple[np.ndarray, list[SampledRow]]:
    generator = new_generator(3)
    runner = Sampler(compiled, placed, generator.fill)
    state = State.begin(compiled.table, generator.randn(SHAPE))
    return state.latents, list(runner.run(state))


def parallel(compiled: Plan, denoiser: Denoiser) -> Parallel:
    sessions = dict.fromkeys(compiled.denoisers, denoiser)
    worker = Worker(compiled, sessions, conditioning(compiled))
    return Parallel(worker, worker)


def test_parallel_branches_run_at_the_same_time() -> None:
    compiled = plan(5, "dpmsolver++")
    expected, _ = run(compiled, Batched(Worker(compiled, {"unet": Denoiser()}, conditioning(compiled))))
    latents, _ = run(compiled, parallel(compiled, MeetingDenoiser()))
    np.testing.assert_array_equal(latents, expected)
    sequential, _ = run(compiled, Sequential(Worker(compiled, {"unet": Denoiser()}, conditioning(compiled))))
    np.testing.assert_array_equal(sequential, expected)


class FailingDenoiser(Denoiser):
    """One branch fails at once; the other ends a while later."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.failing, self.ended = failing, 0

    def bind(self, input_shapes: Mapping[str, tuple[int, ...]]) -> Any:
        binding, index = super().bind(input_shapes), self.bound - 1

        def fail() -> None:
            if index == self.failing:
                raise ExecutionError("unet", "failed")
            threading.Event().wait(0.2)
            self.ended += 1

        binding.run = fail
        return binding


@pytest.mark.parametrize("failing", [0, 1])
def test_a_branch_that_fails_is_told_when_the_other_has_ended(failing: int) -> None:
    compiled, denoiser = plan(2), FailingDenoiser(failing)
    with pytest.raises(ExecutionError, match="unet: failed"):
        run(compiled, parallel(compiled, denoiser))
    assert denoiser.ended == 1


def test_a_crew_raises_when_all_have_ended() -> None:
    ended = threading.Event()

    def fail() -> None:
        raise ExecutionError("unet", "failed")

    def last() -> None:
        threading.Event().wait(0.2)
        ended.set()

    crew = Crew(2)
    with pytest.raises(ExecutionError, match="unet: failed"):
        try:
            crew.run([fail, last])
        finally:
            ended_before = ended.is_set()
    crew.rest()
    assert ended_before


def test_a_workers_thread_ends_with_the_rows() -> None:
    compiled, generator = plan(3), new_generator(3)
    before = set(threading.enumerate())
    runner = Sampler(compiled, parallel(compiled, Denoiser()), generator.fill)
    state = State.begin(compiled.table, generator.randn(SHAPE))
    for _ in range(2):
        rows = runner.run(state, until=state.row + 1)
        next(rows)
        assert [one.name[:15] for one in set(threading.enumerate()) - before] == ["tandemrt-branch"]
        del rows
        assert not set(threading.enumerate()) - before


def test_the_report_says_what_became_of_guidance() -> None:
    compiled = plan(10, guidance_interval=(0.2, 0.6))
    _, rows = run(compiled, Batched(Worker(compiled, {"unet": Denoiser()}, conditioning(compiled))))
    assert [row.guidance.guided for row in rows] == [False] * 2 + [True] * 4 + [False] * 4
    assert {row.guidance.why for row in rows} == {"guided", "outside guidance_interval"}
    assert all((row.guidance.discrepancy is not None) == row.guidance.guided for row in rows)
    _, rows = run(plan(2, guidance_scale=1.0), Batched(Worker(compiled, {"unet": Denoiser()}, conditioning(compiled))))
    assert {row.guidance.why for row in rows} == {"guidance_scale is 1 or below"}


def test_the_discrepancy_is_the_relative_mean_absolute_error() -> None:
    conditional, unconditional = (np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32) for seed in (1, 2))
    expected = np.abs(conditional - unconditional).mean() / (np.abs(unconditional).mean() + 1e-12)
    scratch = np.empty_like(conditional)
    assert relative_mae(conditional, unconditional, scratch) == pytest.approx(expected, rel=1e-6)
    assert relative_mae(conditional, conditional, scratch) == 0.0
    assert relative_mae(conditional, np.zeros_like(conditional), scratch) > 1e9


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_cancelling_leaves_the_pipeline_usable(tmp_path: Path, placement: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    asked: dict[str, Any] = {"prompt": "red", "seed": 7, "placement": placement}
    with Pipeline.open(tmp_path / "bundle", threads=2) as pipeline:
        expected = pipeline(**asked, num_inference_steps=2).latents
        stream = pipeline.stream(**asked, num_inference_steps=50, previews=1)
        assert next(stream).preview
        stream.cancel()
        with pytest.raises(CancelledError, match="after row 1 of 50"):
            next(stream)
        np.testing.assert_array_equal(pipeline(**asked, num_inference_steps=2).latents, expected)


def test_two_streams_share_one_compiled_model(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    with Pipeline.open(tmp_path / "bundle", "openvino:cpu", threads=2) as pipeline:
        models = pipeline._models
        assert models.session("unet", calls=2) is models.session("unet", calls=2)
        for calls in (1, 2):
            assert models.session("unet", calls=calls)._compiled.get_property("NUM_STREAMS") == calls
    with Pipeline.open(tmp_path / "bundle", "onnxruntime:cpu") as pipeline:
        assert pipeline._models.session("unet") is pipeline._models.session("unet", calls=2)


@pytest.mark.parametrize("placement", ["paralel", "", None, 2, ["batched"]])
def test_an_unknown_placement_is_refused(paint: Paint, placement: Any) -> None:
    with pytest.raises(RequestError, match=r"placement: unknown, got .*expected one of batched, sequential, parallel"):
        paint(write_tiny_bundle, "onnxruntime:cpu", placement=placement)


def test_what_cannot_be_two_workers_is_refused_before_the_run(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        with pytest.raises(RequestError, match="placement: CPU threads for two workers, got 1, expected 2 or more"):
            pipeline.stream("red", placement="parallel")
        assert not pipeline._models._sessions
    refused = refusal("parallel", parse_target("onnxruntime:cuda"), None)
    assert isinstance(refused, TargetError)
    assert str(refused).startswith(
        "placement: branches in parallel, got 'onnxruntime:cuda', expected a target of a CPU"
    )
    assert isinstance(refusal("hybridiff", parse_target("openvino:cpu"), 1), RequestError)
    assert refusal("sequential", parse_target("onnxruntime:cuda"), 1) is None
    assert refusal("parallel", parse_target("tensorrt:sm90"), 1) is None


def test_the_command_line_places_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    common = ["generate", str(tmp_path / "bundle"), "--prompt", "red", "--placement"]
    assert main([*common, "sequential", "--print-plan"]) == 0
    assert ", sequential\n" in capsys.readouterr().out
    assert main([*common, "parallel", "--threads", "1", "--print-plan"]) == 2
    assert "CPU threads for two workers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("denoisers", "guided", "guidance", "wrong"),
    [
        (["unet", "unet_small"], [True, True], "fixed", "denoisers unet and unet_small"),
        (["unet", "unet"], [True, False], "fixed", "1 unguided of 2"),
        (
            ["unet", "unet_small"],
            [False, False],
            "adaptive",
            "denoisers unet and unet_small, 2 unguided of 2, adaptive",
        ),
    ],
)
def test_a_window_in_rows_that_cannot_be_names_what_is_wrong_alone(
    denoisers: list[str], guided: list[bool], guidance: str, wrong: str
) -> None:
    with pytest.raises(RequestError, match=rf"rows that hybridiff cannot run \({wrong}( guidance)?\), expected one"):
        require_window_rows(denoisers, guided, guidance)
    require_window_rows(["unet"] * 2, [True] * 2, "fixed")
