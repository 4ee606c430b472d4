"""What denoisers of every family are given: text of several encoders, pooled text, sizes, guidance as an embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from transformers import T5TokenizerFast

from tandemrt.runtime import BundleError, Pipeline, RequestError
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.conditioning import guidance_embedding
from tandemrt.runtime.manifest import Manifest, TextConditioning
from tandemrt.runtime.tokenizer import PromptTokenizer

from .recorded import Recorded
from .tiny_bundle import MAX_LENGTH, TEXT_WIDTH, resign, write_tiny_bundle
from .tiny_families import (
    GUIDANCE_WIDTH,
    SD3_WIDTH,
    T5_LENGTH,
    WIDTH_2,
    write_tiny_lcm,
    write_tiny_sd3,
    write_tiny_sdxl,
)

SDXL_WIDTH = TEXT_WIDTH + WIDTH_2


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("sdxl") / "bundle"
    write_tiny_sdxl(folder)
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("sd3") / "bundle"
    write_tiny_sd3(folder)
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("lcm") / "bundle"
    write_tiny_lcm(folder)
    with Pipeline.open(folder, threads=1) as pipeline:
        yield Recorded(pipeline)


def encoded(bundle: Bundle, name: str, prompt: str) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of a prompt by itself, the first row of each output."""
    facts = bundle.manifest.text.encoders[name]
    ids = PromptTokenizer(bundle.tokenizer_path(name), facts.max_length).tokenize([prompt]).ids
    session = onnxruntime.InferenceSession(bundle.model_path(name))
    names = [output.name for output in session.get_outputs()]
    return {name: values[0] for name, values in zip(names, session.run(None, {"input_ids": ids}), strict=True)}


def sdxl_text(bundle: Bundle, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    one, two = encoded(bundle, "text_encoder", first), encoded(bundle, "text_encoder_2", second)
    return np.concatenate([one["hidden_states.1"], two["hidden_states.3"]], axis=1), two["text_embeds"]


def test_sdxl_reads_two_hidden_layers_side_by_side_and_the_second_s_pooled_text(sdxl: Recorded) -> None:
    (row,) = sdxl.given(prompt="red", prompt_2="blue", negative_prompt="", negative_prompt_2="blue red")
    for branch, texts in ((1, ("red", "blue")), (0, ("", "blue red"))):
        hidden, pooled = sdxl_text(sdxl.pipeline.bundle, *texts)
        np.testing.assert_allclose(row["encoder_hidden_states"][branch], hidden, atol=1e-6)
        np.testing.assert_allclose(row["text_embeds"][branch], pooled, atol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"prompt_2": ""}])
def test_a_second_prompt_that_is_absent_or_empty_is_the_first(sdxl: Recorded, arguments: dict[str, Any]) -> None:
    (row,) = sdxl.given(prompt="red", guidance_scale=1.0, **arguments)
    np.testing.assert_allclose(
        row["encoder_hidden_states"][0], sdxl_text(sdxl.pipeline.bundle, "red", "red")[0], atol=1e-6
    )


def test_an_absent_negative_prompt_is_zeros_to_sdxl_an_empty_one_is_read(sdxl: Recorded) -> None:
    (absent,), (empty,) = sdxl.given(), sdxl.given(negative_prompt="")
    assert not absent["encoder_hidden_states"][0].any()
    assert not absent["text_embeds"][0].any()
    hidden, pooled = sdxl_text(sdxl.pipeline.bundle, "", "")
    np.testing.assert_allclose(empty["encoder_hidden_states"][0], hidden, atol=1e-6)
    np.testing.assert_allclose(empty["text_embeds"][0], pooled, atol=1e-6)


def test_batches_keep_prompts_pooled_text_and_sizes_together(sdxl: Recorded) -> None:
    (row,) = sdxl.given(
        prompt=["red", "blue"], prompt_2="blue", num_images_per_prompt=2, negative_prompt=["", "red"], height=32
    )
    expected = [sdxl_text(sdxl.pipeline.bundle, *texts) for texts in (("", ""), ("red", "red"))]
    expected += [sdxl_text(sdxl.pipeline.bundle, *texts) for texts in (("red", "blue"), ("blue", "blue"))]
    for picture in range(8):
        hidden, pooled = expected[picture // 2]
        np.testing.assert_allclose(row["encoder_hidden_states"][picture], hidden, atol=1e-6)
        np.testing.assert_allclose(row["text_embeds"][picture], pooled, atol=1e-6)
    np.testing.assert_array_equal(row["time_ids"], [[32, 64, 0, 0, 32, 64]] * 8)


def test_sizes_are_diffusers_time_ids_of_either_branch(sdxl: Recorded) -> None:
    (row,) = sdxl.given(original_size=(100, 120), crops_coords_top_left=(3, 5), target_size=(64, 48))
    np.testing.assert_array_equal(row["time_ids"], [[100, 120, 3, 5, 64, 48]] * 2)
    (row,) = sdxl.given(
        original_size=(100, 120),
        crops_coords_top_left=[3, 5],
        negative_original_size=(8, 9),
        negative_target_size=(10, 11),
    )
    np.testing.assert_array_equal(row["time_ids"], [[8, 9, 0, 0, 10, 11], [100, 120, 3, 5, 64, 64]])


def test_embeddings_stand_in_for_the_text_of_all_encoders(sdxl: Recorded) -> None:
    hidden = np.random.default_rng(0).normal(size=(1, MAX_LENGTH, SDXL_WIDTH)).astype(np.float32)
    pooled = np.random.default_rng(1).normal(size=(1, WIDTH_2)).astype(np.float32)
    given = {"prompt": None, "prompt_embeds": hidden, "pooled_prompt_embeds": pooled}
    (row,) = sdxl.given(**given)
    np.testing.assert_array_equal(row["encoder_hidden_states"], [np.zeros_like(hidden[0]), hidden[0]])
    np.testing.assert_array_equal(row["text_embeds"], [np.zeros_like(pooled[0]), pooled[0]])
    (row,) = sdxl.given(**given, negative_prompt_embeds=-hidden, negative_pooled_prompt_embeds=-pooled)
    np.testing.assert_array_equal(row["encoder_hidden_states"], [-hidden[0], hidden[0]])
    np.testing.assert_array_equal(row["text_embeds"], [-pooled[0], pooled[0]])
    (row,) = sdxl.given(**{**given, "prompt_embeds": hidden[:, :5]})
    assert row["encoder_hidden_states"].shape == (2, 5, SDXL_WIDTH)


def test_text_that_several_encoders_cut_is_reported_once(sdxl: Recorded, sd3: Recorded) -> None:
    prompt = "red " * 12
    (cut,) = sdxl.pipeline(prompt, num_inference_steps=1).dropped_text
    assert (cut.text, cut.tokens, cut.encoders) == ("red red ", 2, ("text_encoder", "text_encoder_2"))
    cuts = sd3.pipeline("red " * 21, num_inference_steps=1).dropped_text
    assert [(cut.tokens, cut.encoders) for cut in cuts] == [
        (11, ("text_encoder", "text_encoder_2")),
        (2, ("text_encoder_3",)),
    ]
    with pytest.raises(RequestError, match="too long"):
        sdxl.pipeline("red", prompt_2=prompt, num_inference_steps=1, strict_prompts=True)


def test_sd3_pads_its_clips_and_appends_t5(sd3: Recorded) -> None:
    bundle = sd3.pipeline.bundle
    (row,) = sd3.given(prompt="red", prompt_2="blue", prompt_3="red blue", negative_prompt_3="a", guidance_scale=3.0)
    for branch, texts in ((1, ("red", "blue", "red blue")), (0, ("", "", "a"))):
        names = bundle.manifest.text.encoders
        one, two, three = (encoded(bundle, name, text) for name, text in zip(names, texts, strict=True))
        hidden = row["encoder_hidden_states"][branch]
        assert hidden.shape == (MAX_LENGTH + T5_LENGTH, SD3_WIDTH)
        beside = np.concatenate([one["hidden_states.1"], two["hidden_states.1"]], axis=1)
        np.testing.assert_allclose(hidden[:MAX_LENGTH, :SDXL_WIDTH], beside, atol=1e-6)
        assert not hidden[:MAX_LENGTH, SDXL_WIDTH:].any()
        np.testing.assert_allclose(hidden[MAX_LENGTH:], three["last_hidden_state"], atol=1e-6)
        pooled = np.concatenate([one["text_embeds"], two["text_embeds"]])
        np.testing.assert_allclose(row["pooled_projections"][branch], pooled, atol=1e-6)
    assert row["timestep"].shape == (2,)


def test_sd3_paints_in_16_channels_with_two_sizes_of_transformer(sd3: Recorded) -> None:
    out = sd3.pipeline("red", steps={"transformer": 2, "transformer_small": 4}, seed=1)
    assert out.latents.shape == (1, 16, 8, 8)
    assert out.plan.table.solver == "FlowMatchEulerDiscreteScheduler"
    assert out.images[0].size == (64, 64)


def test_sd3_without_t5_reads_zeros_in_its_place(sd3: Recorded, tmp_path: Path) -> None:
    write_tiny_sd3(tmp_path / "bundle", t5=False)
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        (row,) = Recorded(pipeline).given()
        with pytest.raises(RequestError, match="prompt_3: text encoders of the bundle, expected at most 2"):
            pipeline("red", prompt_3="blue")
    (whole,) = sd3.given()
    np.testing.assert_array_equal(
        row["encoder_hidden_states"][:, :MAX_LENGTH], whole["encoder_hidden_states"][:, :MAX_LENGTH]
    )
    assert row["encoder_hidden_states"].shape == whole["encoder_hidden_states"].shape
    assert not row["encoder_hidden_states"][:, MAX_LENGTH:].any()


@pytest.mark.parametrize("prompt", ["", "red blue", "  red  zz\n", "a red blue", "red " * 30, "\u00e9 red"])
def test_t5_ids_are_those_of_transformers(sd3: Recorded, prompt: str) -> None:
    folder = sd3.pipeline.bundle.tokenizer_path("text_encoder_3").parent
    reference = T5TokenizerFast.from_pretrained(folder)
    ids = PromptTokenizer(folder / "tokenizer.json", T5_LENGTH).tokenize([prompt]).ids[0].tolist()
    assert ids == reference(prompt, padding="max_length", max_length=T5_LENGTH, truncation=True).input_ids


@pytest.mark.parametrize("width", [4, 5, 16, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 8.5])
def test_guidance_as_an_embedding_is_diffusers(width: int, scale: float) -> None:
    weight = torch.tensor(scale - 1).repeat(1)
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, weight, embedding_dim=width)[0]
    ours = guidance_embedding(scale, width)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-3)


def test_a_distilled_denoiser_is_given_guidance_and_runs_one_branch(lcm: Recorded) -> None:
    rows = lcm.given(num_inference_steps=None, steps={"unet": 2, "unet_plain": 2}, guidance_scale=4.0)
    assert [row["sample"].shape[0] for row in rows] == [1, 1]
    np.testing.assert_array_equal(rows[0]["timestep_cond"], [guidance_embedding(4.0, GUIDANCE_WIDTH)])
    out = lcm.pipeline("red", steps={"unet": 2, "unet_plain": 2}, guidance_scale=4.0)
    assert out.plan.guided == (False, False, True, True)
    facts = out.plan.facts()
    assert (facts["guided"], facts["guidance_embedded"]) == ([False, False, True, True], ["unet"])
    assert "guidance 4 on 2 of 4 rows, embedded for unet>" in repr(out.plan)


def test_a_bundle_s_time_steps_hold_until_the_caller_says_otherwise(lcm: Recorded) -> None:
    def timesteps(**arguments: Any) -> list[float]:
        return list(lcm.pipeline("red", **arguments).plan.table.timesteps)

    assert timesteps() == [799, 399]
    assert timesteps(guidance_scale=1.0, solver_config={"timestep_scaling": 5.0}) == [799, 399]
    for arguments in ({"num_inference_steps": 2}, {"steps": {"unet_plain": 2}}, {"solver": "ddim", "steps": 2}):
        assert timesteps(**arguments) != [799, 399]
    assert timesteps(timesteps=[599, 299]) == [599, 299]
    assert len(timesteps(solver="ddim")) == 4


def test_a_bundle_s_time_steps_do_not_hold_where_others_are_to_be_spaced(tmp_path: Path) -> None:
    def changed(manifest: Manifest) -> Manifest:
        euler = msgspec.structs.replace(manifest.scheduler, class_name="EulerDiscreteScheduler", config={})
        return msgspec.structs.replace(
            manifest, scheduler=euler, defaults=msgspec.structs.replace(manifest.defaults, timesteps=(799, 399))
        )

    write_tiny_bundle(tmp_path / "bundle")
    resign(tmp_path / "bundle", changed)
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        assert list(pipeline("red").plan.table.timesteps) == [799, 399]
        for config, rows in (
            ({"use_karras_sigmas": True}, 10),
            ({"timestep_spacing": "trailing"}, 10),
            ({"steps_offset": 1}, 10),
            ({"use_karras_sigmas": False}, 2),
            ({"prediction_type": "v_prediction"}, 2),
        ):
            assert pipeline("red", solver_config=config).plan.table.rows == rows


def test_a_bundle_s_eta_holds_for_its_own_scheduler(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")

    def changed(manifest: Manifest) -> Manifest:
        ddim = msgspec.structs.replace(
            manifest.scheduler,
            class_name="DDIMScheduler",
            config={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False},
        )
        return msgspec.structs.replace(
            manifest, scheduler=ddim, defaults=msgspec.structs.replace(manifest.defaults, eta=0.5)
        )

    resign(tmp_path / "bundle", changed)
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:

        def noisy(**arguments: Any) -> bool:
            return bool(pipeline("red", num_inference_steps=3, **arguments).plan.table.draws_noise.any())

        assert noisy()
        assert not noisy(eta=0.0)
        assert not noisy(solver="dpmsolver++")
        assert not noisy(solver="ddim")


EMBEDS = {"prompt": None, "prompt_embeds": np.zeros((1, MAX_LENGTH, SDXL_WIDTH), np.float32)}
POOLED = np.zeros((1, WIDTH_2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (EMBEDS, r"pooled_prompt_embeds: not given beside prompt_embeds, expected a float32 array \(1, 10\)"),
        ({**EMBEDS, "pooled_prompt_embeds": POOLED[:, :3]}, r"pooled_prompt_embeds: shape, got \(1, 3\)"),
        ({"pooled_prompt_embeds": POOLED}, "pooled_prompt_embeds: given without prompt_embeds"),
        (
            {"negative_prompt_embeds": EMBEDS["prompt_embeds"]},
            "negative_pooled_prompt_embeds: not given beside negative_prompt_embeds",
        ),
        ({**EMBEDS, "pooled_prompt_embeds": POOLED, "prompt_2": "red"}, "prompt_2: given beside prompt_embeds"),
        (
            {"prompt_3": "red"},
            "prompt_3: text encoders of the bundle, expected at most 2, text_encoder, text_encoder_2",
        ),
        ({"prompt_2": ["red", "blue"]}, "prompt_2: how many there are, got 2, expected 1"),
        ({"prompt_2": 5}, "prompt_2: type, got 'int'"),
        ({"negative_prompt_2": "red"}, "negative_prompt_2: given without negative_prompt.*may be empty"),
        ({"original_size": 64}, "original_size: not usable, got 64, expected two whole numbers"),
        ({"original_size": (64, -1)}, r"original_size: not usable, got \(64, -1\)"),
        ({"target_size": (64, 64, 64)}, "target_size: not usable"),
        ({"crops_coords_top_left": (0.5, 0)}, "crops_coords_top_left: not usable"),
        ({"negative_original_size": (64, 64)}, "negative_original_size: given without negative_target_size"),
        ({"negative_crops_coords_top_left": (1, 1)}, "given without negative_original_size"),
    ],
)
def test_what_cannot_condition_sdxl_is_refused_before_anything_runs(
    sdxl: Recorded, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        sdxl.pipeline.stream(**{"prompt": "red", **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_2": "red"}, "prompt_2: text encoders of the bundle, expected at most 1, text_encoder"),
        ({"negative_prompt_2": "red"}, "negative_prompt_2: text encoders of the bundle"),
        ({"original_size": (64, 64)}, "original_size: no denoiser of the plan is conditioned on sizes"),
        (
            {
                "prompt": None,
                "prompt_embeds": np.zeros((1, MAX_LENGTH, TEXT_WIDTH), np.float32),
                "pooled_prompt_embeds": POOLED,
            },
            "pooled_prompt_embeds: the bundle uses no pooled text",
        ),
    ],
)
def test_sdxl_s_arguments_are_refused_by_other_bundles(lcm: Recorded, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        lcm.pipeline.stream(**{"prompt": "red", **arguments})


def edited_text(**changes: Any) -> Any:
    return lambda text: msgspec.structs.replace(text, **changes)


def edited_encoder(name: str, **changes: Any) -> Any:
    def edit(text: TextConditioning) -> TextConditioning:
        encoder = msgspec.structs.replace(text.encoders[name], **changes)
        return msgspec.structs.replace(text, encoders={**text.encoders, name: encoder})

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited_text(encoders={}), "text, got '0 encoders"),
        (edited_text(width=5), "text, got '2 encoders, width 5.*width 18 or more"),
        (edited_text(zero_tokens=-1), "zero_tokens -1"),
        (
            edited_text(width=1 << 16, zero_tokens=1 << 16),
            "tokens and width, got '65548 x 65536'",
        ),
        (edited_text(width=19), "last dimension of encoder_hidden_states of denoiser 'unet', got 18, expected 19"),
        (edited_encoder("text_encoder_2", max_length=13), r"side by side, got \[12, 13\]"),
        (edited_encoder("text_encoder", joins="sequence"), "text.text_encoder_2.joins, got 'width'"),
        (edited_encoder("text_encoder", tokenizer="../secret"), r"no \.\./secret/tokenizer\.json among the files"),
        (edited_encoder("text_encoder", hidden_state="hidden_states.7"), "outputs of text_encoder 'text_encoder'"),
        (edited_encoder("text_encoder_2", pooled=None), "text.text_encoder_2.pooled_width, got 10"),
        (edited_encoder("text_encoder_2", pooled_width=11), "text_embeds of denoiser 'unet', got 10, expected 11"),
    ],
)
def test_a_text_conditioning_that_does_not_fit_is_refused(edit: Any, words: str, tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "bundle")
    resign(tmp_path / "bundle", lambda manifest: msgspec.structs.replace(manifest, text=edit(manifest.text)))
    with pytest.raises(BundleError, match=words):
        Bundle.open(tmp_path / "bundle")


def test_a_tokenizer_is_checked_again_with_its_own_encoder(tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "bundle")
    with Pipeline.open(tmp_path / "bundle") as pipeline:
        (tmp_path / "bundle" / "tokenizer_2" / "tokenizer_config.json").write_text("{}")
        with pytest.raises(BundleError, match=r"tokenizer_2.*It was changed after the bundle was opened"):
            pipeline("red", num_inference_steps=1)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((), r"inputs of denoiser 'unet', got .*timestep_cond float32 \(\).*timestep_cond float32 of rank 2"),
        (("batch", "wide"), "width of timestep_cond of 'unet', got 'wide', expected a number, 4 to 65536"),
        (("batch", 3), "width of timestep_cond of 'unet', got 3"),
    ],
)
def test_an_embedding_of_guidance_has_a_stated_width(shape: tuple[int | str, ...], words: str, tmp_path: Path) -> None:
    write_tiny_lcm(tmp_path / "bundle")

    def changed(manifest: Manifest) -> Manifest:
        unet = manifest.components["unet"]
        inputs = tuple(
            msgspec.structs.replace(spec, shape=shape) if spec.name == "timestep_cond" else spec for spec in unet.inputs
        )
        parts = {**manifest.components, "unet": msgspec.structs.replace(unet, inputs=inputs)}
        return msgspec.structs.replace(manifest, components=parts)

    resign(tmp_path / "bundle", changed)
    with pytest.raises(BundleError, match=words):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timesteps": ()}, r"defaults.timesteps, got \(\), expected falling whole numbers in 65536..0"),
        ({"timesteps": (399, 799)}, "defaults.timesteps"),
        ({"timesteps": (799, 799)}, "defaults.timesteps"),
        ({"timesteps": (799, -1)}, "defaults.timesteps"),
        ({"timesteps": (1 << 17, 5)}, "defaults.timesteps"),
        ({"eta": 1.5}, "defaults.eta, got 1.5, expected 0 to 1"),
        ({"eta": -0.5}, "defaults.eta"),
        ({"guidance_scale": -1.0}, "defaults.guidance_scale, got -1.0, expected a finite number, 0 or more"),
    ],
)
def test_defaults_that_no_plan_could_use_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_tiny_lcm(tmp_path / "bundle")
    resign(
        tmp_path / "bundle",
        lambda manifest: msgspec.structs.replace(
            manifest, defaults=msgspec.structs.replace(manifest.defaults, **changes)
        ),
    )
    with pytest.raises(BundleError, match=words):
        Bundle.open(tmp_path / "bundle")


def test_text_for_more_pictures_than_memory_could_hold_is_refused(sdxl: Recorded) -> None:
    many = {**EMBEDS, "prompt_embeds": np.zeros((1, 4000, SDXL_WIDTH), np.float32), "pooled_prompt_embeds": POOLED}
    with pytest.raises(RequestError, match=r"got '4096 x 4000 x 18', expected at most 268435456\. Ask for fewer"):
        sdxl.pipeline.stream(**many, num_images_per_prompt=4096, height=16, width=16)
