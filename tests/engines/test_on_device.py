"""Step engines on a GPU, in the host's memory: from text to picture the state stays there; what is read back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime import ExecutionError, Output, Pipeline
from tandemrt.runtime.backends.tensorrt import TensorRtSession
from tandemrt.runtime.backends.tensorrt_binding import TensorRtBinding
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.rows import Rows
from tandemrt.runtime.state import State
from tandemrt.runtime.step_sampler import StepEngine, StepSampler
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import Variant

from ..runtime.stand_in_gpus import Gpus, stand_in
from ..runtime.tiny_families import write_tiny_control, write_tiny_editing
from . import on_gpus
from .loops import conditioning, require_state_stays
from .on_gpus import (
    ASKED,
    LATENT_BYTES,
    PICTURE_BYTES,
    SIDE,
    STATE_BYTES,
    TARGET,
    copied,
    require_same_pictures,
    write_variants,
    written,
)

HYBRID: dict[str, Any] = {"steps": {"unet": 2, "unet_second": 2}}
GUIDED = Variant(step="guided")
BOTH = (GUIDED, Variant(step="unguided"))


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("steered"), write_tiny_control, dict.fromkeys(("unet", "unet_second"), BOTH))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("edited"), write_tiny_editing, dict.fromkeys(("unet", "unet_inpaint"), BOTH))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is read back, name and entry, in its order."""
    return noted(monkeypatch, "read")


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The names of what is written to that is otherwise left, together as they are written."""
    return noted(monkeypatch, "write")


def noted(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[Any, ...]]:
    original, calls = getattr(TensorRtBinding, method), list[tuple[Any, ...]]()

    def noting(binding: TensorRtBinding, *what: Any, **more: Any) -> Any:
        calls.append(what)
        return original(binding, *what, **more)

    monkeypatch.setattr(TensorRtBinding, method, noting)
    return calls


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89")


def painted(folder: Path, target: str = TARGET, **arguments: Any) -> Output:
    """On step engines, where the target has any."""
    out = on_gpus.painted(folder, target, **arguments)
    assert out.timings.step_engines == (target == TARGET)
    return out


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("solver", ["unipc", "euler_a"])
def test_the_state_stays_where_the_engines_run(
    steered: Path, gpus: Gpus, reads: list[Any], writes: list[Any], streamed: bool, solver: str
) -> None:
    out = painted(steered, streamed=streamed, solver=solver, **HYBRID)
    assert gpus.wrong == []
    assert reads == [("next_state", 0)]  # the latents that the output has
    assert copied(gpus, "DeviceToHost") == [LATENT_BYTES, PICTURE_BYTES]
    assert sum("state" in one for one in writes) == 3  # each engine's zeros, and the one before the first row
    # From row to row the state, and what the decoder is given.
    assert copied(gpus, "DeviceToDevice") == [STATE_BYTES] * 3 + [LATENT_BYTES]
    assert sum(size == 8 for kind, size in gpus.copies if kind == "DeviceToHost") == (4 if streamed else 1)
    require_same_pictures(out, painted(steered, "onnxruntime:cpu", solver=solver, **HYBRID))


def test_each_picture_of_a_batch_is_handed_to_the_decoder(steered: Path, gpus: Gpus) -> None:
    given = {**HYBRID, "prompt": ["red", "blue"], "seed": [3, 4]}
    out = painted(steered, **given)
    assert copied(gpus, "DeviceToDevice")[-2:] == [LATENT_BYTES] * 2
    require_same_pictures(out, painted(steered, "onnxruntime:cpu", **given))
    assert gpus.wrong == []


def test_what_is_kept_from_one_generation_serves_the_next_as_it_was(steered: Path, gpus: Gpus) -> None:
    """Also where its decoder was handed latents before and is given previews now."""
    with Pipeline.open(steered / "bundle", TARGET, cache=steered / "cache") as pipe:
        given = {**ASKED, **HYBRID}
        first = pipe(**given)
        for more in ({"previews": 1}, {}, {"previews": 2}, {}):
            np.testing.assert_array_equal(np.stack(pipe(**given, **more).images), np.stack(first.images))
    assert gpus.wrong == []


def test_previews_are_read_back_and_nothing_else(steered: Path, gpus: Gpus, reads: list[Any]) -> None:
    previews: list[Any] = []
    for target in (TARGET, "onnxruntime:cpu"):
        cache = steered / "cache" if target == TARGET else None
        with Pipeline.open(steered / "bundle", target, cache=cache) as pipe:
            events = pipe.stream(**ASKED, num_inference_steps=3, solver="ddim", previews=2)
            previews.append([np.asarray(one) for event in events for one in event.preview])
    np.testing.assert_allclose(previews[0], np.array(previews[1], np.int64), atol=1)
    assert reads == [("state", 0), ("prediction", None), ("next_state", 0)]  # for the row in the middle; the latents
    assert copied(gpus, "DeviceToHost") == [LATENT_BYTES, LATENT_BYTES, PICTURE_BYTES, LATENT_BYTES, PICTURE_BYTES]
    assert copied(gpus, "DeviceToDevice") == [STATE_BYTES] * 2 + [LATENT_BYTES]


@pytest.mark.parametrize("names", [("canny",), ("canny", "depth")])
def test_controlnets_are_given_what_is_read_back(
    steered: Path, gpus: Gpus, reads: list[Any], names: tuple[str, ...]
) -> None:
    images = {name: Image.effect_noise((8 * SIDE, 8 * SIDE), 90).convert("RGB") for name in names}
    given = {**HYBRID, "control_image": images, "control_guidance_end": 0.6}
    out = painted(steered, **given)
    # In the first two rows x, for what the ControlNets read.
    assert reads == [("state", 0), ("state", 0), ("next_state", 0)]
    assert copied(gpus, "DeviceToDevice").count(STATE_BYTES) == 3
    require_same_pictures(out, painted(steered, "onnxruntime:cpu", **given))
    assert gpus.wrong == []


@pytest.mark.parametrize("steps", [{"unet": 2, "unet_inpaint": 2}, {"unet_inpaint": 2, "unet": 2}])
def test_what_is_put_back_outside_a_mask_is_put_back_there(edited: Path, gpus: Gpus, steps: dict[str, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8 * SIDE, 8 * SIDE, 3), np.uint8)
    mask = np.zeros((8 * SIDE, 8 * SIDE), np.uint8)
    mask[:, : 4 * SIDE] = 255
    given = {"steps": steps, "image": pixels, "mask_image": mask, "strength": 1.0, "solver": "unipc"}
    out = painted(edited, **given)
    assert copied(gpus, "DeviceToDevice").count(STATE_BYTES) == 3
    require_same_pictures(out, painted(edited, "onnxruntime:cpu", **given))
    assert gpus.wrong == []


def test_step_engines_that_hand_nothing_on_are_passed_over(tmp_path: Path, gpus: Gpus) -> None:
    """As versions made them that read the whole state back."""
    written(tmp_path, write_tiny_control, {})
    write_variants(tmp_path, {"unet": [GUIDED]}, hands=False)
    with Pipeline.open(tmp_path / "bundle", TARGET, cache=tmp_path / "cache") as pipe:
        out = pipe(**ASKED, num_inference_steps=2)
    assert not out.timings.step_engines
    assert "was composed by another version of tandemrt" in " ".join(out.timings.ran_on["unet"][0].refused)


def test_only_engines_of_gpus_make_what_is_handed_on(steered: Path, tmp_path: Path) -> None:
    targets = parse_target("onnxruntime:cpu"), parse_target("openvino:cpu"), parse_target(TARGET)
    plan = BuildPlan(steered / "bundle", targets, tmp_path, ("unet",), (parse_profile("64:guided"),), step=True)
    outputs = [{one.name for one in request.facts.outputs} for request in requests_of(plan, Bundle.open(plan.bundle))]
    step = {"next_state", "prediction"}
    hands = step | {"latent_sample", "sums"}
    assert outputs == [step, step, hands, hands | {"sample", "next_difference", "apart"}]


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
def test_what_is_not_finite_is_found_by_its_sum(steered: Path, gpus: Gpus, streamed: bool) -> None:
    with pytest.raises(ExecutionError, match=r"step 0 \(timestep 999, unet\): NaN or Inf in the (latent|prediction)"):
        painted(steered, streamed=streamed, prompt="red blue", guidance_scale=3.4e38, solver="euler_a", **HYBRID)


def test_a_state_is_taken_out_for_another_and_goes_on_elsewhere(steered: Path, gpus: Gpus) -> None:
    """Two states on one sampler, in turns; then one of them goes on in another sampler, from its arrays."""
    bundle = Bundle.open(steered / "bundle")
    plan = compile_plan(bundle.manifest, Schedule(steps={"unet": 4}, solver="unipc"))
    (found,) = fitting_engines(bundle, "unet", parse_target(TARGET), cache=steered / "cache", variant=GUIDED)

    def sampler() -> StepSampler:
        session = TensorRtSession(found.folder, found.engine)
        given = Rows(plan, conditioning(bundle.manifest, plan), lambda _: None)
        return StepSampler(given, {("unet", True): StepEngine(session, GUIDED)})

    latents = np.random.default_rng(2).standard_normal((2, 1, 4, SIDE, SIDE)).astype(np.float32)
    expected = []
    for one in latents:
        runner = sampler()
        state = State.begin(plan.table, one)
        list(runner.run(state))
        expected.append(state.latents.copy())
    runner = sampler()
    states = [State.begin(plan.table, one) for one in latents]
    for _ in range(2):
        for state in states:
            list(runner.run(state, state.row + 1))
    moved = State(states[0].arrays.copy(), states[0].row)
    list(sampler().run(moved))
    list(runner.run(states[1]))
    for made, wanted in zip((moved, states[1]), expected, strict=True):
        np.testing.assert_array_equal(made.latents, wanted)
    assert gpus.wrong == []


def test_rows_as_one_that_fail_leave_the_state_they_began_from(
    steered: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which lies in a binding of theirs, after rows that ran as one before."""
    bundle = Bundle.open(steered / "bundle")
    plan = compile_plan(bundle.manifest, Schedule(steps={"unet": 4}, solver="unipc"))
    (found,) = fitting_engines(bundle, "unet", parse_target(TARGET), cache=steered / "cache", variant=GUIDED)
    session, latents = TensorRtSession(found.folder, found.engine), np.ones((1, 4, SIDE, SIDE), np.float32)
    given = Rows(plan, conditioning(bundle.manifest, plan), lambda _: None, at_once=True)
    original, spoilt = TensorRtBinding.chain, [False]

    def spoiling(binding: TensorRtBinding, runs: Any, carried: Any) -> Any:
        chain, (last, _) = original(binding, runs, carried), runs[-1]

        def run() -> None:
            chain.run()
            if spoilt[0]:
                for name in ("sums", "next_state"):
                    last.outputs[name].fill(np.nan)
                last.write("next_state")

        return SimpleNamespace(rows=chain.rows, run=run)

    monkeypatch.setattr(TensorRtBinding, "chain", spoiling)
    made = []
    for fails in (False, True):
        runner = StepSampler(given, {("unet", True): StepEngine(session, GUIDED)})
        state, spoilt[0] = State.begin(plan.table, latents), False
        assert [row.together for row in runner.run(state, 2)] == [2, 2]
        spoilt[0] = fails
        assert [row.together for row in runner.run(state)] == ([1, 1] if fails else [2, 2])
        made.append(state.latents.copy())
    np.testing.assert_array_equal(*made)
    assert gpus.wrong == []


def test_a_row_that_fails_leaves_the_state_before_it(
    steered: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though that lies in the binding whose run wrote over it."""
    bundle = Bundle.open(steered / "bundle")
    plan = compile_plan(bundle.manifest, Schedule(steps={"unet": 4}, solver="unipc"))
    (found,) = fitting_engines(bundle, "unet", parse_target(TARGET), cache=steered / "cache", variant=GUIDED)
    given = Rows(plan, conditioning(bundle.manifest, plan), lambda _: None)

    def halfway() -> tuple[StepSampler, State]:
        runner = StepSampler(given, {("unet", True): StepEngine(TensorRtSession(found.folder, found.engine), GUIDED)})
        state = State.begin(plan.table, np.ones((1, 4, SIDE, SIDE), np.float32))
        list(runner.run(state, 2))
        return runner, state

    require_state_stays(*halfway(), halfway()[1], monkeypatch)
    assert gpus.wrong == []
