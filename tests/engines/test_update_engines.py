"""Denoisers on a GPU, in the host's memory, with update engines: guidance and the solver run there too."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.composed import composed_stages
from tandemrt.engines.estimate import estimated
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime import ExecutionError, Pipeline
from tandemrt.runtime.backends.tensorrt import TensorRtSession
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import read_layers
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.placement import Sequential, Worker
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.rows import Rows
from tandemrt.runtime.stage_parts import Part
from tandemrt.runtime.state import State
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.update_sampler import UpdateSampler
from tandemrt.runtime.variant import PLAIN, UPDATE, Variant

from ..runtime.stand_in_gpus import Gpus, stand_in
from ..runtime.tiny_bundle import (
    write_tiny_bundle,
)
from ..runtime.tiny_families import write_tiny_control, write_tiny_editing, write_tiny_sd3
from .loops import conditioning, require_state_stays
from .on_gpus import (
    ASKED,
    LATENT_BYTES,
    PICTURE_BYTES,
    SIDE,
    STATE_BYTES,
    TARGET,
    copied,
    on_update_engines,
    painted,
    require_same,
    write_cut_bundle,
    write_variants,
    written,
)
from .tandem import PLACED, ROWS, WINDOW, build_stages

HYBRID: dict[str, Any] = {"steps": {"unet": 3, "unet_small": 3}}
ADAPTIVE: dict[str, Any] = {"guidance": "adaptive", "guidance_config": {"threshold": 10.0, "steady": 1e6, "probe": 3}}


def updates(*denoisers: str) -> dict[str, tuple[Variant, ...]]:
    return dict.fromkeys(denoisers, (UPDATE,))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plain"), write_tiny_bundle, updates("unet", "unet_small"))


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("steered"), write_tiny_control, updates("unet", "unet_second"))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("edited"), write_tiny_editing, updates("unet", "unet_inpaint"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89", "sm89")


CASES: list[tuple[dict[str, Any], int]] = [
    ({"placement": "batched"}, 0),
    ({"placement": "sequential"}, 0),
    ({"placement": "parallel"}, 0),
    ({"placement": "parallel", "solver": "euler_a"}, 5),
    ({"placement": "sequential", "guidance_interval": (0.0, 0.5)}, 0),
    ({"placement": "batched", **ADAPTIVE}, 0),
    ({"placement": "parallel", **ADAPTIVE, "solver": "unipc"}, 0),
]


@pytest.mark.parametrize("devices", [None, (0, 1)], ids=["one", "two"])
@pytest.mark.parametrize(("asked", "noisy_rows"), CASES, ids=str)
def test_between_text_and_picture_nothing_of_a_latents_size_is_up_or_downloaded(
    plain: Path, gpus: Gpus, asked: dict[str, Any], noisy_rows: int, devices: tuple[int, ...] | None
) -> None:
    given = {**HYBRID, **asked}
    out = painted(plain, devices=devices, **given)
    assert on_update_engines(out)
    # When it is bound an engine is given zeros; then the state before the first row, and the noise that rows draw.
    assert Counter(copied(gpus, "HostToDevice")) == {STATE_BYTES: 2 + 1, LATENT_BYTES: 2 * 5 + noisy_rows}
    assert copied(gpus, "DeviceToHost") == [LATENT_BYTES, PICTURE_BYTES]  # the latents that the output has
    both = sum(row.guided for row in out.plan.ran)
    across = 2 * both if devices and asked["placement"] == "parallel" else 0  # the second GPU's sample and prediction
    assert copied(gpus, "direct") == [LATENT_BYTES] * across
    assert gpus.wrong == []
    require_same(out, painted(plain, "onnxruntime:cpu", **given))
    if "guidance" in asked:
        assert 2 <= both < 6


# In parallel on one GPU runs part their scratch memory when they first meet, which may be in any row.
@pytest.mark.parametrize("solver", ["unipc", "euler_a"])
@pytest.mark.parametrize(("placement", "devices"), [("batched", None), ("sequential", None), ("parallel", (0, 1))])
def test_once_it_runs_no_row_takes_memory_or_records_a_graph(
    plain: Path, gpus: Gpus, placement: str, solver: str, devices: tuple[int, ...] | None
) -> None:
    with Pipeline.open(plain / "bundle", TARGET, cache=plain / "cache", threads=2, devices=devices) as pipe:
        stream = pipe.stream(**ASKED, num_inference_steps=6, placement=placement, solver=solver)
        made = [(gpus.allocated, gpus.recorded) for _ in stream]
        assert on_update_engines(stream.result())
    assert min(made[2]) > 0
    assert made[3:] == made[2:3] * 3
    assert gpus.wrong == []


def test_what_is_kept_from_one_generation_serves_the_next_as_it_was(plain: Path, gpus: Gpus) -> None:
    """Also where another placement was tried on it, and where previews are read back."""
    previews = []
    for target in (TARGET, "onnxruntime:cpu"):
        cache = plain / "cache" if target == TARGET else None
        with Pipeline.open(plain / "bundle", target, cache=cache, threads=2) as pipe:
            given = {**ASKED, **HYBRID, "placement": "sequential"}
            first = pipe(**given)
            for more in ({"placement": "auto"}, {}, {"num_images_per_prompt": 2}, {"placement": "parallel"}, {}):
                np.testing.assert_allclose(pipe(**{**given, **more}).images[0], first.images[0], atol=2e-5)
            events = pipe.stream(**given, previews=2)
            previews.append([np.asarray(one, np.int64) for event in events for one in event.preview])
    np.testing.assert_allclose(previews[0], previews[1], atol=1)
    assert gpus.wrong == []


@pytest.mark.parametrize("placement", ["batched", "parallel"])
def test_controlnets_are_given_what_is_read_back(steered: Path, gpus: Gpus, placement: str) -> None:
    image = Image.effect_noise((8 * SIDE, 8 * SIDE), 90).convert("RGB")
    given = {"steps": {"unet": 2, "unet_second": 2}, "placement": placement, **ADAPTIVE}
    given.update(control_image={"canny": image}, control_guidance_end=0.6)
    out = painted(steered, **given)
    assert on_update_engines(out)
    require_same(out, painted(steered, "onnxruntime:cpu", **given))
    assert gpus.wrong == []


@pytest.mark.parametrize("more", [{}, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("steps", [{"unet": 3, "unet_inpaint": 3}, {"unet_inpaint": 3, "unet": 3}], ids=str)
def test_channels_lie_behind_the_latent_and_masks_are_put_back(
    edited: Path, gpus: Gpus, steps: dict[str, int], more: dict[str, Any]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8 * SIDE, 8 * SIDE, 3), np.uint8)
    mask = np.zeros((8 * SIDE, 8 * SIDE), np.uint8)
    mask[:, : 4 * SIDE] = 255
    given = {"steps": steps, "image": pixels, "mask_image": mask, "strength": 1.0, "placement": "sequential", **more}
    out = painted(edited, **given)
    assert on_update_engines(out)
    require_same(out, painted(edited, "onnxruntime:cpu", **given))
    assert gpus.wrong == []


def test_transformers_have_names_of_their_own(tmp_path: Path, gpus: Gpus) -> None:
    folder = written(tmp_path, write_tiny_sd3, updates("transformer"))
    given = {"steps": {"transformer": 3}, "placement": "sequential"}
    out = painted(folder, **given)
    assert on_update_engines(out)
    require_same(out, painted(folder, "onnxruntime:cpu", **given))


@pytest.mark.parametrize("placement", ["batched", "parallel"])
def test_what_is_not_finite_is_found(plain: Path, gpus: Gpus, placement: str) -> None:
    with pytest.raises(ExecutionError, match=r"step 0 \(timestep 999, unet\): NaN or Inf in the (latent|prediction)"):
        painted(plain, prompt="red blue", guidance_scale=3.4e38, solver="euler_a", placement=placement, **HYBRID)


def test_without_an_engine_for_every_denoiser_the_host_goes_on_and_says_why(tmp_path: Path, gpus: Gpus) -> None:
    folder = written(tmp_path, write_tiny_bundle, updates("unet"))
    out = painted(folder, placement="sequential", **HYBRID)
    assert not on_update_engines(out)
    refused = " ".join(out.timings.ran_on["unet"][0].refused)
    assert "update engine" in refused
    assert "is not run, since none does for unet_small" in refused
    assert on_update_engines(painted(folder, placement="sequential", steps={"unet": 2}))


def test_a_state_is_taken_out_for_another_and_goes_on_elsewhere(plain: Path, gpus: Gpus) -> None:
    """Two states on one sampler, in turns; then one of them goes on in another sampler, from its arrays."""
    bundle = Bundle.open(plain / "bundle")
    plan = compile_plan(bundle.manifest, Schedule(steps={"unet": 4}, solver="unipc"))
    rows = Rows(plan, conditioning(bundle.manifest, plan), lambda _: None)

    def session(variant: Variant) -> TensorRtSession:
        (found,) = fitting_engines(bundle, "unet", parse_target(TARGET), cache=plain / "cache", variant=variant)
        return TensorRtSession(found.folder, found.engine)

    def sampler() -> UpdateSampler:
        worker = Worker(plan, {"unet": session(PLAIN)}, rows.conditioning, hands=True)
        return UpdateSampler(rows, Sequential(worker), {"unet": session(UPDATE)})

    latents = np.random.default_rng(2).standard_normal((2, 1, 4, SIDE, SIDE)).astype(np.float32)
    expected = []
    for one in latents:
        state = State.begin(plan.table, one)
        list(sampler().run(state))
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


def test_a_row_that_fails_leaves_the_state_before_it(plain: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(plain / "bundle")
    plan = compile_plan(bundle.manifest, Schedule(steps={"unet": 4}, solver="unipc"))
    rows = Rows(plan, conditioning(bundle.manifest, plan), lambda _: None)

    def session(variant: Variant) -> TensorRtSession:
        (found,) = fitting_engines(bundle, "unet", parse_target(TARGET), cache=plain / "cache", variant=variant)
        return TensorRtSession(found.folder, found.engine)

    def halfway() -> tuple[UpdateSampler, State]:
        worker = Worker(plan, {"unet": session(PLAIN)}, rows.conditioning, hands=True)
        runner = UpdateSampler(rows, Sequential(worker), {"unet": session(UPDATE)})
        state = State.begin(plan.table, np.ones((1, 4, SIDE, SIDE), np.float32))
        list(runner.run(state, 2))
        return runner, state

    require_state_stays(*halfway(), halfway()[1], monkeypatch)
    assert gpus.wrong == []


def test_who_looks_on_sees_what_the_models_are_given(plain: Path, gpus: Gpus) -> None:
    seen: list[float] = []
    with Pipeline.open(
        plain / "bundle",
        TARGET,
        cache=plain / "cache",
        observe=lambda name, inputs: seen.append(float(np.abs(inputs["sample"]).max())) if name == "unet" else None,
    ) as pipe:
        assert not on_update_engines(pipe(**ASKED, steps={"unet": 2}, placement="sequential"))
    assert len(seen) == 4
    assert min(seen) > 0


@pytest.fixture(scope="module")
def cut(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With stages of the denoiser, for the stand-ins and for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("cut")
    written(folder, lambda bundle: write_cut_bundle(bundle, exported("sd15")), updates("unet"))
    write_variants(folder, {"unet": list(composed_stages(Bundle.open(folder / "bundle"), "unet", PLAIN, 2))})
    build_stages(folder / "bundle", folder / "cache", "unet", 2)
    return folder


@pytest.mark.parametrize(("stride", "devices"), [(1, None), (2, None), (2, (0, 1))])
def test_the_window_of_stages_stays_there_too(
    cut: Path, gpus: Gpus, stride: int, devices: tuple[int, ...] | None
) -> None:
    window = {"placement": "hybridiff", "placement_config": {**WINDOW, "stride": stride}}
    made = []
    for target, at in ((TARGET, devices), ("onnxruntime:cpu", None)):
        with Pipeline.open(cut / "bundle", target, cache=cut / "cache", threads=2, devices=at) as pipe:
            made.append(pipe(**ASKED, **window, num_inference_steps=ROWS))
    assert on_update_engines(made[0])
    require_same(*made)
    assert [row.placement for row in made[0].plan.ran] == PLACED[stride]
    assert made[0].plan.taus == made[1].plan.taus == (2, 4)
    assert copied(gpus, "DeviceToHost") == [LATENT_BYTES, PICTURE_BYTES]
    assert copied(gpus, "HostToDevice").count(STATE_BYTES) == 2
    assert gpus.wrong == []


def test_a_pipelined_rows_models_do_not_count_what_stages_are_handed(
    cut: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    give, pause_s = Part.give, 0.05

    def slow(part: Part, *given: Any) -> None:
        time.sleep(pause_s)
        give(part, *given)

    monkeypatch.setattr(Part, "give", slow)
    out = painted(cut, num_inference_steps=ROWS, placement="hybridiff", placement_config=WINDOW)
    for row in (row for row in out.timings.rows if row.guidance.placement == "pipelined"):
        assert 0 < row.model_ms <= row.total_ms - 2 * pause_s * 1e3


def test_tensorrt_builds_update_engines_beside_step_engines(tiny: Bundle, tmp_path: Path) -> None:
    target, profiles = (
        parse_target("tensorrt-rtx:sm89"),
        (parse_profile("64..96:guided"), parse_profile("64..96:unguided")),
    )
    plan = BuildPlan(tiny.path, (target,), tmp_path, ("unet",), profiles, step=True)
    requests = {one.ingredients.variant: one for one in requests_of(plan, tiny)}
    assert requests.keys() == {Variant(step="guided"), Variant(step="unguided"), UPDATE}
    update = requests[UPDATE]
    assert update.title == "unet (update) for tensorrt-rtx:sm89, 64..96:guided, 64..96:unguided"
    assert estimated(update).size_bytes < estimated(requests[Variant(step="guided")]).size_bytes
    outcome = ensure_engine(update, tmp_path, lambda label, done, total: None, {})
    shapes = {name: ranges.opt for name, ranges in update.ingredients.profiles[0].items()}
    found = fitting_engines(tiny, "unet", target, shapes, cache=tmp_path, variant=UPDATE)
    assert [one.folder for one in found] == [outcome.folder]
    assert {one.precision for one in read_layers(outcome.folder)} <= {"float", ""}
