"""Step engines under the pipeline: the plain loop's pictures, and the plain loop where the cache lacks one."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.engines import composed
from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.engines.step import step_graph
from tandemrt.runtime import CancelledError, ExecutionError, Output, Pipeline, engine_files, engine_session
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.cli import main
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.ran_on import Ran
from tandemrt.runtime.solvers import SOLVERS
from tandemrt.runtime.targets import parse_target

from ..runtime.tiny_bundle import write_tiny_bundle
from ..runtime.tiny_families import (
    write_tiny_control,
    write_tiny_editing,
    write_tiny_lcm,
    write_tiny_sd3,
    write_tiny_sdxl,
)
from .test_build import silent

ORT, OPENVINO = "onnxruntime:cpu", "openvino:cpu"
GUIDED, BOTH = ("64:guided",), ("64:guided", "64:unguided")
HYBRID = {"unet": 10, "unet_small": 15}


def build(bundle: Path, cache: Path, *components: str, target: str = ORT, profiles: Any = BOTH, **more: Any) -> None:
    """Build engines of components, step engines unless otherwise told, into a cache."""
    parsed = tuple(map(parse_profile, profiles))
    plan = BuildPlan(bundle, (parse_target(target),), cache, components, parsed, **{"step": True, **more})
    for request in requests_of(plan, Bundle.open(bundle)):
        ensure_engine(request, cache, silent, {})


def painted(bundle: Path, target: str = ORT, **arguments: Any) -> Output:
    with Pipeline.open(bundle, target, threads=1) as pipe:
        return pipe(**{"prompt": "red blue", "seed": 7, "num_inference_steps": 4, "output_type": "np", **arguments})


Tiny = tuple[Path, Path]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """A family's bundle, and a cache with step engines of some of its denoisers; neither to be written to."""
    made: dict[Any, Tiny] = {}

    def tiny(write: Callable[[Path], Manifest], *components: str, profiles: tuple[str, ...] = BOTH) -> Tiny:
        if write not in made:
            folder = tmp_path_factory.mktemp("family")
            write(folder / "bundle")
            build(folder / "bundle", folder / "cache", *components, profiles=profiles)
            made[write] = folder / "bundle", folder / "cache"
        return made[write]

    return tiny


@pytest.fixture
def unets(tinies: Callable[..., Tiny]) -> Tiny:
    return tinies(write_tiny_bundle, "unet", "unet_small")


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Output, Output]]:
    """What a pipeline paints on a cache's step engines, and what on denoisers."""

    def both(bundle: Path, cache: Path, target: str = ORT, **arguments: Any) -> tuple[Output, Output]:
        outputs = []
        for folder, fused in ((cache, True), (tmp_path / "plain", False)):
            monkeypatch.setenv("TANDEMRT_CACHE", str(folder))
            outputs.append(painted(bundle, target, **arguments))
            assert outputs[-1].timings.step_engines is fused
        return outputs[0], outputs[1]

    return both


Both = Callable[..., tuple[Output, Output]]


def require_equal(fused: Output, plain: Output) -> None:
    np.testing.assert_array_equal(fused.latents, plain.latents)
    np.testing.assert_array_equal(np.stack(fused.images), np.stack(plain.images))
    assert plain.latents.std() > 0.1


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"flow_euler"}))
def test_every_solvers_pictures_are_the_plain_loops(unets: Tiny, both: Both, solver: str) -> None:
    eta = 0.3 if solver in ("ddim", "tcd") else None
    require_equal(*both(*unets, solver=solver, eta=eta, steps={"unet": 3, "unet_small": 3}, num_inference_steps=None))


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": HYBRID, "num_inference_steps": None, "guidance_scale": 7.0},
        {"steps": HYBRID, "num_inference_steps": None, "guidance_interval": (0.2, 0.6), "solver": "euler_a"},
        {"guidance_scale": 1.0},
        {"prompt": ["red", "blue"], "num_images_per_prompt": 2, "seed": [1, 2, 3, 4], "solver": "dpmsolver++sde"},
        {"height": 96, "width": 128, "solver_config": {"prediction_type": "v_prediction"}},
    ],
    ids=["hybrid", "interval", "unguided", "batch", "size"],
)
def test_what_a_request_says_is_the_same_on_step_engines(unets: Tiny, both: Both, arguments: dict[str, Any]) -> None:
    require_equal(*both(*unets, **arguments))


@pytest.mark.parametrize(
    ("write", "components", "profiles"),
    [
        (write_tiny_sdxl, ("unet",), GUIDED),
        (write_tiny_sd3, ("transformer",), GUIDED),
        (write_tiny_lcm, ("unet", "unet_plain"), BOTH),
    ],
    ids=["sdxl", "sd3", "lcm"],
)
def test_every_familys_pictures_are_the_plain_loops(
    tinies: Callable[..., Tiny], both: Both, write: Any, components: tuple[str, ...], profiles: tuple[str, ...]
) -> None:
    steps = dict.fromkeys(components, 3)
    family = tinies(write, *components, profiles=profiles)
    fused, plain = both(*family, steps=steps, num_inference_steps=None, num_images_per_prompt=2)
    require_equal(fused, plain)
    assert fused.plan.guidance_embedded == (("unet",) if write is write_tiny_lcm else ())


@pytest.mark.parametrize(("name", "masked"), [("unet", False), ("unet", True), ("unet_inpaint", True)])
def test_editing_is_the_same_on_step_engines(tinies: Callable[..., Tiny], both: Both, name: str, masked: bool) -> None:
    image, mask = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    arguments: dict[str, Any] = {"image": image, "strength": 0.7, "steps": {name: 6}, "num_inference_steps": None}
    masks = {"mask_image": mask} if masked else {}
    family = tinies(write_tiny_editing, "unet", "unet_inpaint", profiles=GUIDED)
    require_equal(*both(*family, **arguments, **masks))


def test_controlnets_run_beside_step_engines(tinies: Callable[..., Tiny], both: Both) -> None:
    family = tinies(write_tiny_control, "unet", "unet_free")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    steered: dict[str, Any] = {
        "control_image": {"canny": image, "depth": image[::-1]},
        "controlnet_conditioning_scale": {"canny": 0.8, "depth": -0.5},
        "control_guidance_start": {"canny": 0.1, "depth": 0.0},
        "control_guidance_end": {"canny": 0.5, "depth": 0.4},
    }
    steps: dict[str, Any] = {"steps": {"unet": 6, "unet_free": 2}, "num_inference_steps": None}
    for more in ({}, {"guidance_interval": (0.0, 0.3), "solver": "unipc"}):
        fused, plain = both(*family, num_images_per_prompt=2, **steered, **steps, **more)
        require_equal(fused, plain)
    free = both(*family, num_images_per_prompt=2, **steps, guidance_interval=(0.0, 0.3), solver="unipc")
    assert np.abs(free[0].latents - fused.latents).max() > 1e-3


def test_a_controlnet_that_makes_nan_is_named(tinies: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, cache = tinies(write_tiny_control, "unet", "unet_free")
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ExecutionError, match=r"step 0 .*controlnet_canny\): NaN or Inf in what the ControlNet makes"):
        painted(bundle, control_image={"canny": image}, controlnet_conditioning_scale=3e38, guidance_scale=1.0)


def test_previews_and_events_are_the_same(unets: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for folder in (unets[1], tmp_path):
        monkeypatch.setenv("TANDEMRT_CACHE", str(folder))
        with Pipeline.open(unets[0], threads=1) as pipe:
            events = list(pipe.stream("red", seed=7, num_inference_steps=4, solver="heun", previews=2))
        seen.append([(one.row, one.step, one.timestep, [*map(np.asarray, one.preview)]) for one in events])
    assert len(seen[0]) == 7
    np.testing.assert_equal(seen[0], seen[1])


def test_cancelling_stops_between_rows_and_before_engines_are_loaded(
    unets: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(unets[1]))
    loaded, load = [], engine_session.open_engine

    def cancelling(*arguments: Any, **more: Any) -> Any:
        loaded.append(arguments[0].engine.component)
        stream.cancel()
        return load(*arguments, **more)

    steps = {"unet": 2, "unet_small": 2}
    with Pipeline.open(unets[0], threads=1) as pipe:
        with monkeypatch.context() as patch:
            patch.setattr(engine_session, "open_engine", cancelling)
            stream = pipe.stream("red", steps=steps)
            with pytest.raises(CancelledError, match="after row 0 of 4"):
                stream.result()
        assert loaded == ["unet"]
        stream = pipe.stream("red", steps=steps)
        next(stream)
        canceller = threading.Thread(target=stream.cancel)
        canceller.start()
        canceller.join()
        with pytest.raises(CancelledError, match="after row 1 of 4"):
            next(stream)
        assert pipe("red", steps=steps).timings.step_engines


def test_the_cache_is_looked_through_once(unets: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(unets[1]))
    with Pipeline.open(unets[0], threads=1) as pipe:
        assert pipe("red", num_inference_steps=2).timings.step_engines
        monkeypatch.setattr(engine_files, "read_sidecar", None)
        assert pipe("red", num_inference_steps=3, num_images_per_prompt=2).timings.step_engines
        assert pipe("red", num_inference_steps=3, guidance_scale=0.0).timings.step_engines


def test_denoisers_are_not_loaded_beside_their_step_engines(unets: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(unets[1]))
    with Pipeline.open(unets[0], threads=1) as pipe:
        pipe("red", steps={"unet": 1, "unet_small": 1})
        assert not {name for name, *_ in pipe._models._sessions} & {"unet", "unet_small"}
    with pytest.raises(ExecutionError, match="pipeline: used after it was closed"):
        pipe._steps.load({}, before=lambda: None, ran=Ran())


def test_folded_engines_run_their_time_steps_and_leave_others_to_the_loop(
    tmp_path: Path, both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, cache = tmp_path / "bundle", tmp_path / "cache"
    write_tiny_editing(bundle)
    build(bundle, cache, "unet", profiles=GUIDED, fold_steps=5)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for arguments in ({}, {"image": image, "strength": 0.5}, {"solver": "dpmsolver++sde"}):
        require_equal(*both(bundle, cache, **arguments, num_inference_steps=5))
    monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
    other = painted(bundle, num_inference_steps=6)
    assert not other.timings.step_engines
    assert other.timings.ran_on["unet"][0].refused[0].endswith("has other time steps built in")
    build(bundle, cache, "unet", profiles=GUIDED)
    fused = painted(bundle, num_inference_steps=6)
    assert fused.timings.step_engines
    require_equal(fused, other)


def test_a_time_step_alone_is_folded_into_constants(tmp_path: Path, both: Both) -> None:
    bundle, cache = tmp_path / "bundle", tmp_path / "cache"
    write_tiny_bundle(bundle)
    build(bundle, cache, "unet", profiles=("64:unguided",), fold_steps=1)
    (sidecar,) = cache.rglob("engine.json")
    assert not {"timestep", "step_index"} & {one["name"] for one in json.loads(sidecar.read_bytes())["inputs"]}
    fused, plain = both(bundle, cache, num_inference_steps=1, guidance_scale=0.0)
    # ONNX Runtime adds the constants to biases beforehand, and rounds once less.
    np.testing.assert_allclose(fused.latents, plain.latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("profiles", "arguments", "told"),
    [
        (
            ("64:guided",),
            {"steps": {"unet": 2, "unet_small": 2}, "num_inference_steps": None},
            "is not run, since none does for unet_small with guidance",
        ),
        (
            ("64:guided",),
            {"guidance_interval": (0.0, 0.5)},
            "is not run, since none does for unet without guidance",
        ),
        (("64:unguided",), {}, None),
    ],
    ids=["another denoiser", "rows without guidance", "rows with guidance"],
)
def test_where_an_engine_is_missing_the_plain_loop_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unets: Tiny,
    profiles: tuple[str, ...],
    arguments: Mapping[str, Any],
    told: str | None,
) -> None:
    build(unets[0], tmp_path, "unet", profiles=profiles)
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    monkeypatch.setattr(engine_session, "open_engine", None)
    plain = painted(unets[0], **arguments).timings
    assert not plain.step_engines
    refused = [why.split(" ", 3)[3] for one in plain.ran_on["unet"] for why in one.refused]
    assert refused == ([] if told is None else [told])


def test_a_solver_of_more_history_than_the_state_holds_runs_on_the_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unets: Tiny
) -> None:
    monkeypatch.setattr(composed, "step_graph", partial(step_graph, history=1))
    build(unets[0], tmp_path, "unet", profiles=GUIDED)
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    assert painted(unets[0], solver="euler").timings.step_engines
    assert painted(unets[0], solver="dpmsolver++").timings.step_engines
    plain = painted(unets[0], solver="pndm").timings
    assert not plain.step_engines
    assert plain.ran_on["unet"][0].refused[0].endswith("holds 1 earlier predictions, and the solver carries 3")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"placement": "sequential"}, "placement sequential takes no step engines"),
        ({"guidance": "adaptive"}, "adaptive guidance takes no step engines"),
    ],
)
def test_step_engines_that_a_request_is_not_for_are_told(
    unets: Tiny, tmp_path: Path, asked: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache, unasked in ((unets[1], told), (tmp_path, "")):
        monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
        ran = painted(unets[0], guidance_scale=5.0, **asked).timings.ran_on
        assert {(one.unasked, one.refused) for one in ran["unet"]} == {(unasked, ())}
        assert {one.unasked for one in ran["vae_decoder"]} == {""}


def test_a_damaged_engine_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unets: Tiny) -> None:
    build(unets[0], tmp_path, "unet", profiles=GUIDED)
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    whole = painted(unets[0])
    assert whole.timings.step_engines
    (model,) = tmp_path.rglob("model.onnx")
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with Pipeline.open(unets[0], threads=1) as pipe:
        for _ in range(2):
            again = pipe("red blue", seed=7, num_inference_steps=4, output_type="np")
            assert not again.timings.step_engines
            require_equal(again, whole)
            (ran,) = again.timings.ran_on["unet"]
            assert ran.engine is None
            assert f"step engine {model.parent.name[:12]} cannot be run: {model}: sha256, got" in ran.refused[0]
            assert re.search(r" with `tandemrt build-engine .* --step --profile 64x64:b1:guided.*`\.$", ran.refused[0])


def test_a_damaged_engine_is_told_where_another_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unets: Tiny
) -> None:
    for cache, profile in ((tmp_path / "narrow", "64:guided"), (tmp_path, "64..128:guided")):
        build(unets[0], cache, "unet", target=OPENVINO, profiles=(profile,))
    (wide,) = engines_folder(tmp_path).iterdir()
    (narrow,) = engines_folder(tmp_path / "narrow").iterdir()
    narrow = narrow.rename(wide.with_name(narrow.name))
    os.truncate(narrow / "engine.blob", 1000)
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    with Pipeline.open(unets[0], OPENVINO, threads=1) as pipe:
        for height, told in ((64, 1), (64, 1), (128, 0)):
            timings = pipe("red", seed=7, num_inference_steps=2, output_type="latent", height=height).timings
            assert timings.step_engines
            (ran,) = timings.ran_on["unet"]
            assert ran.engine == wide.name
            assert len(ran.refused) == told
            assert all(why.startswith(f"step engine {narrow.name[:12]} cannot be run: {narrow}") for why in ran.refused)


def test_openvino_runs_step_engines_within_their_profiles(
    tmp_path: Path, both: Both, monkeypatch: pytest.MonkeyPatch, unets: Tiny
) -> None:
    bundle, _ = unets
    build(bundle, tmp_path, "unet", target=OPENVINO, profiles=("64:guided:b1-b2",))
    steps: dict[str, Any] = {"num_inference_steps": 10, "solver": "euler_a"}
    for count in (1, 2):
        fused, plain = both(bundle, tmp_path, OPENVINO, num_images_per_prompt=count, **steps)
        np.testing.assert_allclose(fused.latents, plain.latents, rtol=0, atol=1e-4 * np.abs(plain.latents).max())
        np.testing.assert_allclose(np.stack(fused.images), np.stack(plain.images), rtol=0, atol=1e-4)
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    for other in ({"height": 96}, {"num_images_per_prompt": 3}):
        plain = painted(bundle, OPENVINO, **steps, **other).timings
        assert not plain.step_engines
        (why,) = plain.ran_on["unet"][0].refused
        assert re.search(
            r"^step engine .* has no profile for this call: state \(.*\) is outside \(4, 1\.\.2, 4, 8, 8\)", why
        )


@pytest.mark.parametrize(("target", "atol", "fold_steps"), [(ORT, 0, None), (OPENVINO, 1e-4, 4)])
def test_trained_models_paint_the_plain_loops_pictures(
    shapes_bundle: Path, tmp_path: Path, both: Both, target: str, atol: float, fold_steps: int | None
) -> None:
    build(shapes_bundle, tmp_path, "unet_small", target=target, profiles=GUIDED, fold_steps=fold_steps)
    # The plain loop's engine has attention as one node too, which rounds in its own way.
    build(shapes_bundle, tmp_path / "plain", "unet_small", target=target, profiles=GUIDED, step=False)
    arguments: dict[str, Any] = {"prompt": "a red circle left of a blue square", "guidance_scale": 2.0}
    steps: dict[str, Any] = {"steps": {"unet_small": 4}, "num_inference_steps": None}
    solver = "euler_a" if fold_steps is None else None
    fused, plain = both(shapes_bundle, tmp_path, target, solver=solver, **arguments, **steps)
    np.testing.assert_allclose(np.stack(fused.images), np.stack(plain.images), rtol=0, atol=atol)
    assert np.stack(plain.images).std() > 0.1


def test_threads_share_step_engines(unets: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(unets[1]))
    with Pipeline.open(unets[0], threads=1) as pipe, ThreadPoolExecutor(4) as pool:

        def latents(seed: int) -> Any:
            output = pipe("red", seed=seed, steps={"unet": 2, "unet_small": 2}, output_type="latent")
            assert output.timings.step_engines
            return output.latents

        together = list(pool.map(latents, range(8)))
        for seed, made in enumerate(together):
            np.testing.assert_array_equal(made, latents(seed))
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_generate_says_what_it_ran_on(
    unets: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cache, fused in ((unets[1], True), (tmp_path, False)):
        monkeypatch.setenv("TANDEMRT_CACHE", str(cache))
        arguments = ["generate", str(unets[0]), "--prompt", "red", "--seed", "7", "--num-inference-steps", "2"]
        assert main([*arguments, "--output-dir", str(tmp_path / str(fused)), "--json"]) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert image["step_engines"] is fused
        assert main([*arguments, "--output-dir", str(tmp_path / str(fused)), "--force"]) == 0
        assert ("on onnxruntime:cpu, step engines, seed 7" in capsys.readouterr().out) is fused
