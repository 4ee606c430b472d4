"""The pipeline on a miniature bundle: requests, streams, threads, and what is refused."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import ismodule
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt import runtime
from tandemrt.runtime import (
    ArgumentError,
    BundleError,
    ExecutionError,
    Pipeline,
    PlanError,
    RequestError,
    TargetError,
)
from tandemrt.runtime.images import image_from_pixels

from .tiny_bundle import MAX_LENGTH, TEXT_WIDTH, resign, write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as pipeline:
        yield pipeline


def pictures(pipeline: Pipeline, **arguments: Any) -> np.ndarray:
    settings = {"prompt": "red blue", "seed": 7, "num_inference_steps": 4, "output_type": "np", **arguments}
    return np.stack(pipeline(**settings).images)


def test_same_seed_same_picture_other_seed_other_picture(pipe: Pipeline) -> None:
    np.testing.assert_array_equal(pictures(pipe), pictures(pipe))
    assert np.abs(pictures(pipe) - pictures(pipe, seed=8)).max() > 1e-3
    assert np.abs(pictures(pipe) - pictures(pipe, prompt="blue red")).max() > 1e-5


def test_defaults_and_facts_of_an_output(pipe: Pipeline) -> None:
    out = pipe("red", seed=1)
    assert out.plan.steps == (("unet", 10),)
    assert out.images[0].size == (64, 64)
    assert out.latents.shape == (1, 4, 8, 8)
    assert out.latents.dtype == np.float32
    assert out.seeds == (1,)
    assert out.dropped_text == ()
    assert len(out.timings.rows) == 10
    assert out.timings.denoise_ms <= out.timings.total_ms


def test_what_is_printed_is_short(bundle: Path) -> None:
    with Pipeline.open(bundle, threads=1) as pipeline:
        out = pipeline("red", seed=1, steps={"unet": 4, "unet_small": 6}, guidance_interval=(0, 0.5))
        assert repr(pipeline) == f"<Pipeline {bundle} on onnxruntime:cpu, open>"
    assert repr(pipeline).endswith("closed>")
    assert repr(out.plan) == "<Plan unet 4, unet_small 6; DPMSolverMultistepScheduler; guidance 5 on 5 of 10 rows>"
    assert str(out).startswith("<Output 1 images, latents (1, 4, 8, 8), ")
    assert str(out).endswith(f" ms, seeds (1,), 0 dropped texts, {out.plan!r}>")


def test_output_types_show_the_same_picture(pipe: Pipeline) -> None:
    image = pipe("red blue", seed=7, num_inference_steps=4).images[0]
    array = pictures(pipe)[0]
    assert array.dtype == np.float32
    assert array.shape == (64, 64, 3)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(image_from_pixels(array)))
    assert pipe("red", seed=7, num_inference_steps=1, output_type="latent").images == ()


def test_a_random_seed_is_reported_and_reproduces(pipe: Pipeline) -> None:
    first = pipe("red", num_inference_steps=2, output_type="np")
    again = pipe("red", num_inference_steps=2, output_type="np", seed=first.seeds)
    np.testing.assert_array_equal(first.images[0], again.images[0])


def test_batches_order_prompts_then_pictures(pipe: Pipeline) -> None:
    both = pictures(pipe, prompt=["red", "blue"], num_images_per_prompt=2, seed=[1, 2, 3, 4])
    assert both.shape == (4, 64, 64, 3)
    for index, (prompt, seed) in enumerate([("red", 1), ("red", 2), ("blue", 3), ("blue", 4)]):
        np.testing.assert_allclose(both[index], pictures(pipe, prompt=prompt, seed=[seed])[0], atol=1e-5)


def test_one_seed_for_a_batch_is_one_generator(pipe: Pipeline) -> None:
    batch = pictures(pipe, prompt=["red", "red"])
    np.testing.assert_allclose(batch[0], pictures(pipe, prompt="red")[0], atol=1e-5)
    assert np.abs(batch[0] - batch[1]).max() > 1e-3


def test_every_picture_has_a_seed(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"prompt": ["red", "blue"], "num_images_per_prompt": 2, "num_inference_steps": 1}
    assert pipe(**arguments, seed=7).seeds == (7,) * 4
    assert pipe(**arguments, seed=[1, 2, 3, 4]).seeds == (1, 2, 3, 4)
    drawn = pipe(**arguments, output_type="np")
    assert len(drawn.seeds) == len(drawn.images) == 4
    again = pipe(**arguments, output_type="np", seed=drawn.seeds[0])
    np.testing.assert_array_equal(np.stack(drawn.images), np.stack(again.images))


def test_latents_and_embeddings_stand_in_for_seed_and_text(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(pictures(pipe, latents=noise, seed=1), pictures(pipe, latents=noise, seed=2))
    embeds = np.random.default_rng(1).normal(size=(1, MAX_LENGTH, TEXT_WIDTH)).astype(np.float32)
    with_embeds = pictures(pipe, prompt=None, prompt_embeds=embeds)
    assert np.abs(with_embeds - pictures(pipe)).max() > 1e-5
    guided = pictures(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=-embeds)
    assert np.abs(with_embeds - guided).max() > 1e-5


def test_negative_prompts_count_only_under_guidance(pipe: Pipeline) -> None:
    assert np.abs(pictures(pipe, negative_prompt="blue") - pictures(pipe)).max() > 1e-5
    np.testing.assert_array_equal(
        pictures(pipe, negative_prompt="blue", guidance_scale=1.0), pictures(pipe, guidance_scale=1.0)
    )


def test_tandem_lies_between_its_models(pipe: Pipeline) -> None:
    large, small = (pictures(pipe, num_inference_steps=None, steps={name: 6}) for name in ("unet", "unet_small"))
    tandem = pictures(pipe, num_inference_steps=None, steps={"unet": 3, "unet_small": 3})
    assert 0 < np.abs(tandem - large).mean() < np.abs(small - large).mean()


def test_over_long_prompts_are_cut_and_reported_or_refused(pipe: Pipeline) -> None:
    out = pipe("red " * 30 + "blue", seed=1, num_inference_steps=1)
    assert out.dropped_text[0].text.endswith("blue")
    with pytest.raises(RequestError, match="too long"):
        pipe("red " * 30 + "blue", num_inference_steps=1, strict_prompts=True)


def test_stream_tells_each_row_and_ends_with_the_calls_picture(pipe: Pipeline) -> None:
    stream = pipe.stream("red blue", seed=7, steps={"unet": 3, "unet_small": 2}, previews=2, output_type="np")
    events = list(stream)
    assert [event.row for event in events] == [0, 1, 2, 3, 4]
    assert {event.rows for event in events} == {5}
    assert [event.timing.denoiser for event in events] == ["unet"] * 3 + ["unet_small"] * 2
    assert [len(event.preview) for event in events] == [0, 1, 0, 1, 0]
    assert events[1].preview[0].size == (64, 64)
    np.testing.assert_array_equal(
        stream.result().images[0],
        pictures(pipe, num_inference_steps=None, steps={"unet": 3, "unet_small": 2})[0],
    )


def test_result_runs_what_is_left(pipe: Pipeline) -> None:
    stream = pipe.stream("red blue", seed=7, num_inference_steps=4, output_type="np")
    next(stream)
    np.testing.assert_array_equal(stream.result().images[0], pictures(pipe)[0])
    assert stream.result() is stream.result()


def test_threads_paint_what_one_thread_paints(pipe: Pipeline) -> None:
    jobs = [
        {"seed": seed, "prompt": prompt, "height": size}
        for seed in range(4)
        for prompt in ("red", "blue")
        for size in (64, 32)
    ]
    serial = [pictures(pipe, **job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda job: pictures(pipe, **job), jobs))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


def test_handing_over_to_the_same_model_changes_no_bit(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / "unet_small")
    shutil.copytree(tmp_path / "bundle" / "unet", tmp_path / "bundle" / "unet_small")
    resign(tmp_path / "bundle")
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        for solver in ("dpmsolver++", "euler_a", "pndm", "unipc"):
            whole = pictures(pipeline, num_inference_steps=6, solver=solver)
            for first in range(1, 6):
                steps = {"unet": first, "unet_small": 6 - first}
                split = pictures(pipeline, num_inference_steps=None, steps=steps, solver=solver)
                np.testing.assert_array_equal(split, whole)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompt": []}, RequestError, "prompt: an empty list"),
        ({"prompt": None}, RequestError, "exactly one of prompt and prompt_embeds"),
        ({"prompt": "\ud800"}, RequestError, "prompt"),
        ({"prompt": 5}, RequestError, "prompt"),
        ({"prompt": "x" * 3_000_000}, RequestError, "prompt"),
        ({"height": 60}, RequestError, "height.*got 60, expected a positive multiple of 16"),
        ({"width": 0}, RequestError, "width.*got 0"),
        ({"width": 64.0}, RequestError, "width"),
        ({"width": 10**400}, RequestError, r"width.*Ask for 16384\."),
        ({"num_inference_steps": 0}, PlanError, "got 0"),
        ({"num_inference_steps": 5000}, PlanError, "5000"),
        ({"num_inference_steps": 5, "steps": 5}, RequestError, "steps: given beside"),
        ({"num_inference_steps": None, "steps": {"unet_huge": 3}}, PlanError, "unet_huge"),
        ({"guidance_scale": math.nan}, RequestError, "guidance_scale.*got nan"),
        ({"seed": -(2**63) - 1}, RequestError, "seed"),
        ({"seed": 2**64}, RequestError, "seed"),
        ({"seed": 1.5}, RequestError, "seed"),
        ({"seed": [1, 2]}, RequestError, "seed.*got 2"),
        ({"seed_device": "tpu"}, ArgumentError, "tpu"),
        ({"decoder": "vae_decoder_huge"}, RequestError, "vae_decoder_huge.*expected one of vae_decoder"),
        ({"num_images_per_prompt": 0}, RequestError, "num_images_per_prompt"),
        ({"negative_prompt": ["a", "b", "c"]}, RequestError, "negative_prompt.*got 3"),
        ({"latents": np.zeros((1, 4, 8, 8))}, RequestError, "latents.*float64"),
        ({"latents": np.zeros((1, 4, 9, 8), np.float32)}, RequestError, "latents.*shape"),
        ({"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, RequestError, "latents.*NaN"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 5, 3), np.float32)}, RequestError, "prompt_embeds.*shape"),
        (
            {"prompt": None, "prompt_embeds": np.zeros((1, 5, 8), np.float32)},
            RequestError,
            r"prompt_embeds: tokens, got 5, expected 12.*Give negative_prompt_embeds",
        ),
        ({"output_type": "jpeg"}, RequestError, "output_type.*jpeg"),
        ({"previews": -1}, RequestError, "previews"),
        ({"solver": "magic"}, PlanError, "magic"),
        ({"solver": "ddim", "solver_config": {"use_karras_sigmas": True}}, PlanError, "use_karras_sigmas"),
        ({"guidance_interval": (0.5, 2.0)}, PlanError, "guidance_interval"),
        ({"guidance_interval": 0.5}, PlanError, "guidance_interval.*got 0.5"),
        ({"guidance_interval": ("0", "1")}, PlanError, "guidance_interval.*got .'0', '1'"),
        ({"guidance_interval": (0,)}, PlanError, "guidance_interval"),
        ({"num_inference_steps": 2.5}, RequestError, "num_inference_steps.*got 2.5"),
        ({"num_inference_steps": 10**5000}, PlanError, "num_inference_steps|steps"),
        ({"num_inference_steps": None, "steps": "10,15"}, PlanError, "steps.*got '10,15'"),
        ({"num_inference_steps": None, "steps": [10, 15]}, PlanError, r"steps.*got \[10, 15\]"),
        ({"num_inference_steps": None, "steps": 2.5}, PlanError, "steps.*got 2.5"),
        ({"num_inference_steps": None, "steps": [("unet", 1, 2)]}, PlanError, "steps"),
        ({"num_inference_steps": None, "steps": {"unet": True}}, PlanError, "steps: unet.*got True"),
        ({"solver": ["a"]}, PlanError, r"solver.*got \['a'\]"),
        ({"solver": ""}, PlanError, "solver.*got ''"),
        ({"solver_config": [1]}, PlanError, r"solver_config.*got \[1\]"),
        ({"solver_config": {1: 2}}, PlanError, "solver_config"),
        ({"solver_config": {"beta_start": np.zeros((3, 3))}}, PlanError, "beta_start"),
        ({"solver_config": {"beta_start": 10**400}}, PlanError, "beta_start"),
        ({"solver_config": {"beta_schedule": np.zeros((3, 3))}}, PlanError, "beta_schedule"),
        ({"solver_config": {"num_train_timesteps": 10**13}}, PlanError, "num_train_timesteps.*2..100000"),
        ({"solver_config": {"steps_offset": 10**13}}, PlanError, "steps_offset"),
        (
            {"solver_config": {"lambda_min_clipped": 5, "timestep_spacing": "trailing"}},
            PlanError,
            "lambda_min_clipped.*got 5",
        ),
        ({"timesteps": 5}, PlanError, "timesteps.*got 5"),
        ({"timesteps": [[1], [1, 2]]}, PlanError, r"timesteps.*got \[\[1\], \[1, 2\]\]"),
        ({"timesteps": b"\2\1"}, PlanError, "timesteps"),
        ({"timesteps": "999,1"}, PlanError, "timesteps"),
        ({"guidance_scale": "5"}, RequestError, "guidance_scale.*got '5'"),
        ({"guidance_scale": 10**400}, RequestError, "guidance_scale"),
        ({"negative_prompt": 5}, RequestError, "negative_prompt.*got 'int'"),
        ({"prompt": None, "prompt_embeds": 3.0}, RequestError, "prompt_embeds.*got 'float'"),
        ({"prompt": None, "prompt_embeds": np.zeros((0, 5, 8), np.float32)}, RequestError, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 0, 8), np.float32)}, RequestError, "prompt_embeds"),
        ({"negative_prompt_embeds": np.zeros((1, 5, 8), np.float32)}, RequestError, "negative_prompt_embeds.*shape"),
        ({"negative_prompt_embeds": [1]}, RequestError, "negative_prompt_embeds.*got 'list'"),
        ({"height": 999_936}, RequestError, "height.*got 999936.*at most 16384"),
        ({"height": 16_384, "width": 16_384, "num_images_per_prompt": 2}, RequestError, "pixels of all pictures"),
        ({"num_images_per_prompt": 10**9}, RequestError, "num_images_per_prompt"),
    ],
)
def test_unusable_requests_are_refused_in_one_line(
    pipe: Pipeline, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        pictures(pipe, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("embeds", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_are_checked_before_anything_runs(pipe: Pipeline, embeds: str) -> None:
    narrow = np.zeros((1, MAX_LENGTH, TEXT_WIDTH - 1), np.float32)
    with pytest.raises(RequestError, match=f"{embeds}: shape"):
        pipe.stream(None if embeds == "prompt_embeds" else "red", guidance_scale=1.0, **{embeds: narrow})


def test_numpy_numbers_are_numbers(pipe: Pipeline) -> None:
    numbers = {"num_inference_steps": np.int64(4), "guidance_scale": np.float32(5), "height": np.int32(64)}
    np.testing.assert_array_equal(pictures(pipe, **numbers, num_images_per_prompt=np.int64(1)), pictures(pipe))
    steps = {"unet": np.int64(2), "unet_small": np.uint8(1)}
    plan = pipe("red", steps=steps, guidance_interval=(np.float64(0), 1)).plan
    assert plan.steps == (("unet", 2), ("unet_small", 1))
    times = np.array([900, 500, 1])
    assert pipe("red", timesteps=times, solver="lcm").plan.table.timesteps.tolist() == times.tolist()


def test_all_public_names_are_listed() -> None:
    public = {name for name, value in vars(runtime).items() if not name.startswith("_") and not ismodule(value)}
    assert public == set(runtime.__all__)


@pytest.mark.parametrize("call", ["__call__", "stream"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("generator", "Give seed="),
        ("callback_on_step_end", r"Use pipe\.stream"),
        ("return_dict", "Output"),
        ("guidance_scal", r"Did you mean 'guidance_scale'\?"),
        ("cross_attention_kwargs", r"Leave it out\."),
    ],
)
def test_unknown_arguments_are_named_with_what_to_give_instead(
    pipe: Pipeline, call: str, name: str, remedy: str
) -> None:
    with pytest.raises(RequestError, match=rf"^{name}: unknown argument, expected one of prompt, .*{remedy}"):
        getattr(pipe, call)("red", **{name: 3})


def test_a_closed_pipeline_refuses_and_closes_again(bundle: Path) -> None:
    pipeline = Pipeline.open(bundle)
    pipeline("red", num_inference_steps=1)
    pipeline.close()
    pipeline.close()
    with pytest.raises(ExecutionError, match="closed"):
        pipeline("red", num_inference_steps=1)


def test_a_target_that_is_not_here_is_refused_when_opening(bundle: Path) -> None:
    with pytest.raises(TargetError, match="openvino:gpu"):
        Pipeline.open(bundle, target="openvino:gpu:fp32")


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 1025, 2**31])
def test_a_thread_count_that_cannot_be_is_refused_when_opening(bundle: Path, threads: Any) -> None:
    with pytest.raises(ArgumentError, match=r"threads.*expected a whole number in 1\.\.1024"):
        Pipeline.open(bundle, threads=threads)


def test_a_missing_onnxruntime_is_told_when_opening(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match=r"onnxruntime: is not installed.*tandemrt\[cpu\]"):
        Pipeline.open(bundle, target="onnxruntime:cpu")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TargetError, match=r"onnxruntime: is not installed.*tandemrt\[cpu\]"):
        Pipeline.open(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.onnx",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/model.onnx",
        "unet/model.onnx.data",
        "vae_decoder/model.onnx",
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "size", "link", "folder"])
def test_what_was_replaced_after_opening_is_not_loaded(tmp_path: Path, name: str, kind: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle" / name
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        if kind == "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "folder":
            path.parent.rename(tmp_path / "elsewhere")
            path.parent.symlink_to(tmp_path / "elsewhere")
        else:
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if kind == "bytes" else data + b" ")
        with pytest.raises(BundleError, match=re.escape(str(path.parent if kind == "folder" else path))):
            pipeline("red", num_inference_steps=1)


@pytest.mark.parametrize(
    ("name", "other"),
    [("unet", "vae_decoder"), ("text_encoder", "unet_small"), ("vae_decoder", "text_encoder")],
)
def test_a_model_with_other_tensors_than_listed_is_refused(tmp_path: Path, name: str, other: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / name)
    shutil.copytree(tmp_path / "bundle" / other, tmp_path / "bundle" / name)
    resign(tmp_path / "bundle")
    with (
        Pipeline.open(tmp_path / "bundle", threads=1) as pipeline,
        pytest.raises(BundleError, match=f"{name}/model.onnx: tensors of the model, got .*, expected "),
    ):
        pipeline("red", num_inference_steps=1)


def test_a_picture_needs_no_torch(bundle: Path, tmp_path: Path) -> None:
    script = f"""
import sys
for name in ("torch", "diffusers", "transformers", "onnx"):
    sys.modules[name] = None
from tandemrt.runtime import Pipeline
with Pipeline.open({str(bundle)!r}) as pipe:
    pipe("red", steps={{"unet": 2, "unet_small": 2}}, seed=7).images[0].save({str(tmp_path / "out.png")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert (tmp_path / "out.png").stat().st_size > 100
