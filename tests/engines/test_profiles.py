"""Profiles: their grammar, and the shapes that follow from them for every kind of component."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemrt.engines.profiles import Profile, Span, check_profiles, default_profile, input_ranges, parse_profile
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.manifest import Manifest, TensorSpec
from tandemrt.runtime.request_checks import MAX_SIDE

from ..runtime.tiny_bundle import MAX_LENGTH, TEXT_WIDTH, write_tiny_bundle
from ..runtime.tiny_families import write_tiny_control, write_tiny_sd3, write_tiny_sdxl
from .conftest import Requests


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_tiny_bundle(tmp_path_factory.mktemp("profiles") / "tiny")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", Profile("512", Span(512, 512, 512), Span(512, 512, 512), Span(1, 1, 1))),
        ("768x512", Profile("768x512", Span(768, 768, 768), Span(512, 512, 512), Span(1, 1, 1))),
        ("64x64:b1-b4", Profile("64x64:b1-b4", Span(64, 64, 64), Span(64, 64, 64), Span(1, 1, 4))),
        ("64x64:b2..4", Profile("64x64:b2..4", Span(64, 64, 64), Span(64, 64, 64), Span(2, 2, 4))),
        (
            "512..768x512..1024:b1..4:opt=512x640:b2",
            Profile(
                "512..768x512..1024:b1..4:opt=512x640:b2", Span(512, 512, 768), Span(512, 640, 1024), Span(1, 2, 4)
            ),
        ),
        ("512..768", Profile("512..768", Span(512, 768, 768), Span(512, 768, 768), Span(1, 1, 1))),
        ("fast=64:guided", Profile("fast", Span(64, 64, 64), Span(64, 64, 64), Span(1, 1, 1), "guided")),
        ("64:b2:unguided", Profile("64:b2:unguided", Span(64, 64, 64), Span(64, 64, 64), Span(2, 2, 2), "unguided")),
    ],
)
def test_grammar(text: str, expected: Profile) -> None:
    assert parse_profile(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "512x", "512x512x512", "512x512:", "512:4", "512:b", "512:b1:b2", "512:opt=512:opt=512", "-512",
        "5 12", "512:guided:unguided", "512..", "512..768:opt=512..640", "512:b1..4:opt=512:b1..2", "=512", "9=512",
        "a b=512", "512:b1-4-6", "0", "64..32", "64:b0", "64:b4..2", "64..128:opt=32", "64:b1..2:opt=64:b3", "9999999",
        "64:b99999",
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="--profile"):
        parse_profile(text)


@given(st.text(max_size=40))
def test_any_text_is_a_profile_or_an_argument_error(text: str) -> None:
    try:
        parse_profile(text)
    except ArgumentError as error:
        assert "--profile" in str(error)


sides = st.integers(1, MAX_SIDE // 16).map(lambda count: count * 16)
spans = st.lists(sides, min_size=3, max_size=3).map(lambda values: Span(*sorted(values)))
counts = st.lists(st.integers(1, 16), min_size=3, max_size=3).map(lambda values: Span(*sorted(values)))


@given(spans, spans, counts, st.sampled_from(["", ":guided", ":unguided"]))
def test_a_written_profile_is_read_back(width: Span, height: Span, images: Span, guidance: str) -> None:
    text = (
        f"{width.minimum}..{width.maximum}x{height.minimum}..{height.maximum}:b{images.minimum}-b{images.maximum}"
        f"{guidance}:opt={width.optimum}x{height.optimum}:b{images.optimum}"
    )
    profile = parse_profile(text)
    assert (profile.width, profile.height, profile.images) == (width, height, images)
    assert profile.guidance == (guidance[1:] or "any")


@given(width=spans, height=spans, images=counts, guidance=st.sampled_from(["any", "guided", "unguided"]))
def test_every_call_of_a_profile_is_within_its_ranges(
    manifest: Manifest, width: Span, height: Span, images: Span, guidance: str
) -> None:
    profile = Profile("p", width, height, images, guidance)  # type: ignore[arg-type]
    ranges = input_ranges("unet", manifest.components["unet"], manifest, profile)
    for one in ranges.values():
        assert one.holds(one.min)
        assert one.holds(one.opt)
        assert one.holds(one.max)
    for guided in {"any": (False, True), "guided": (True,), "unguided": (False,)}[guidance]:
        for count in (images.minimum, images.optimum, images.maximum):
            rows = count * (1 + guided)
            assert ranges["sample"].holds((rows, 4, height.optimum // 8, width.optimum // 8))
            assert ranges["encoder_hidden_states"].holds((rows, MAX_LENGTH, TEXT_WIDTH))
    assert not ranges["sample"].holds((2 * images.maximum + 1, 4, height.optimum // 8, width.optimum // 8))


def test_text_and_decoders_run_one_at_a_time(manifest: Manifest) -> None:
    profile = parse_profile("64..128x64:b4")
    text = input_ranges("text_encoder", manifest.components["text_encoder"], manifest, profile)
    assert text["input_ids"].min == text["input_ids"].max == (1, MAX_LENGTH)
    decoder = input_ranges("vae_decoder", manifest.components["vae_decoder"], manifest, profile)["latent_sample"]
    assert (decoder.min, decoder.max) == ((1, 4, 8, 8), (1, 4, 8, 16))


def test_opt_is_both_branches_where_the_bundle_guides(manifest: Manifest) -> None:
    unet = manifest.components["unet"]
    assert input_ranges("unet", unet, manifest, parse_profile("64"))["sample"].opt == (2, 4, 8, 8)
    unguided = msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, guidance_scale=0))
    assert input_ranges("unet", unet, unguided, parse_profile("64"))["sample"].opt == (1, 4, 8, 8)


def test_controlnets_residuals_follow_the_latent(tmp_path: Path) -> None:
    manifest = write_tiny_control(tmp_path / "bundle")
    name = next(name for name in manifest.names("denoiser") if len(manifest.components[name].inputs) > 3)
    ranges = input_ranges(name, manifest.components[name], manifest, parse_profile("64..96:b1..2"))
    hidden = ranges["mid_block_additional_residual"].max[1]
    assert ranges["mid_block_additional_residual"].min == (1, hidden, 4, 4)
    assert ranges["mid_block_additional_residual"].max == (4, hidden, 6, 6)
    (control,) = manifest.names("controlnet")[:1]
    seen = input_ranges(control, manifest.components[control], manifest, parse_profile("64..96:b1..2"))
    assert (seen["controlnet_cond"].min, seen["controlnet_cond"].max) == ((1, 3, 64, 64), (4, 3, 96, 96))
    assert seen["conditioning_scale"].max == (1,)


@pytest.mark.parametrize("write", [write_tiny_sdxl, write_tiny_sd3])
def test_every_input_of_other_families_has_a_range(write: object, tmp_path: Path) -> None:
    manifest: Manifest = write(tmp_path / "bundle")  # type: ignore[operator]
    for name, component in manifest.components.items():
        ranges = input_ranges(name, component, manifest, default_profile(manifest))
        assert ranges.keys() == {spec.name for spec in component.inputs}
        assert all(min(one.min) >= 1 for one in ranges.values())


def test_sides_are_multiples_of_what_the_models_take(manifest: Manifest) -> None:
    check_profiles([parse_profile("64")], manifest, ["unet"])
    check_profiles([parse_profile("72")], manifest, ["vae_decoder"])
    with pytest.raises(ArgumentError, match=r"width, got 72, expected a multiple of 16 pixels. Use 64"):
        check_profiles([parse_profile("72x64")], manifest, ["unet", "vae_decoder"])


def test_names_are_told_apart(manifest: Manifest) -> None:
    with pytest.raises(ArgumentError, match="a name given twice, got 'a'"):
        check_profiles([parse_profile("a=64"), parse_profile("a=128")], manifest, ["unet"])


def test_a_profile_given_under_two_names_is_refused(manifest: Manifest) -> None:
    same = [parse_profile("a=512"), parse_profile("b=512x512:b1")]
    with pytest.raises(ArgumentError, match=r"--profile b: the same calls as --profile a, got '512x512:b1'"):
        check_profiles(same, manifest, ("unet",))
    check_profiles([*same[:1], parse_profile("b=512:guided")], manifest, ("unet",))


def test_profiles_that_are_one_to_a_component_keep_their_names(requests: Requests) -> None:
    profiles = ("a=64", "b=128", "64..128")
    text, unet = requests("tensorrt-rtx:sm89", components=("text_encoder", "unet"), profiles=profiles)
    assert (text.profile_names, len(text.ingredients.profiles)) == (("a, b, 64..128",), 1)
    assert (unet.profile_names, len(unet.ingredients.profiles)) == (("a", "b", "64..128"), 3)


def test_a_size_outside_the_model_is_refused(manifest: Manifest) -> None:
    decoder = msgspec.structs.replace(
        manifest.components["vae_decoder"],
        inputs=(TensorSpec(name="latent_sample", dtype="float32", shape=("batch", 4, 8, 8)),),
    )
    assert input_ranges("vae_decoder", decoder, manifest, parse_profile("64"))["latent_sample"].max == (1, 4, 8, 8)
    with pytest.raises(ArgumentError, match=r"axis 2 of latent_sample, got 16, expected 8"):
        input_ranges("vae_decoder", decoder, manifest, parse_profile("64x128"))
