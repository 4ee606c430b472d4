"""Where guidance's branches run on engines whose profiles take some calls alone, on stand-ins for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.runtime import EngineError, Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.variant import PLAIN, Variant

from ..runtime.engine_writing import write_engines
from ..runtime.stand_in_gpus import Gpus, stand_in
from ..runtime.tiny_bundle import write_tiny_bundle
from .on_gpus import ASKED, SIDE, TARGET, painted, require_same_pictures, write_variants

HYBRID: dict[str, Any] = {"steps": {"unet": 2, "unet_small": 2}}
GUIDED, UNGUIDED = (f"{8 * SIDE}:b1:{calls}" for calls in ("guided", "unguided"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89", "sm89")


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Path]:
    """A bundle, and beside it a cache with engines, of its denoisers for these calls alone."""

    def build(*profiles: str) -> Path:
        write_tiny_bundle(tmp_path / "bundle")
        write_engines(tmp_path / "cache", tmp_path / "bundle", "sm89", "text_encoder", "vae_decoder")
        bundle = Bundle.open(tmp_path / "bundle")
        for name, profile in product(HYBRID["steps"], profiles):
            ranges = input_ranges(name, bundle.component(name), bundle.manifest, parse_profile(profile))
            write_variants(tmp_path, {name: [PLAIN]}, profiles=(ranges,))
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("profile", "can"), [(GUIDED, {"batched"}), (UNGUIDED, {"parallel", "sequential"})], ids=["guided", "unguided"]
)
def test_auto_tries_what_the_profiles_take(built: Callable[..., Path], gpus: Gpus, profile: str, can: set[str]) -> None:
    folder = built(profile)
    out = painted(folder, placement="auto", **HYBRID)
    assert out.timings.tried.keys() == can
    assert {row.placement for row in out.plan.ran} <= can
    assert len(list(folder.glob("cache/placements/*"))) == 1
    require_same_pictures(out, painted(folder, "onnxruntime:cpu", **HYBRID))
    assert gpus.wrong == []


ONE_OUTSIDE_TWO = r"unet: .*sample \(1, 4, 16, 16\) is outside \(2, 4, 16, 16\)"


@pytest.mark.parametrize(
    ("profiles", "asked", "misfit"),
    [
        ((GUIDED,), {"placement": "sequential"}, ONE_OUTSIDE_TWO),
        ((GUIDED,), {"placement": "parallel"}, ONE_OUTSIDE_TWO),
        ((UNGUIDED,), {"placement": "parallel", "num_images_per_prompt": 2}, r"sample \(2, 4, 16, 16\) is outside"),
        ((UNGUIDED,), {"placement": "sequential", "height": 64}, r"sample \(1, 4, 8, 16\) is outside"),
        ((), {"placement": "sequential"}, "unet: there is no engine"),
    ],
)
def test_a_placement_that_no_profile_takes_is_refused_before_anything_runs(
    built: Callable[..., Path], gpus: Gpus, profiles: tuple[str, ...], asked: dict[str, Any], misfit: str
) -> None:
    folder = built(*profiles)
    with Pipeline.open(folder / "bundle", TARGET, cache=folder / "cache") as pipe:
        with pytest.raises(EngineError, match=rf"{misfit}.*tandemrt build-engine .*--component unet --profile 128x"):
            pipe.stream(**{**ASKED, **HYBRID, **asked})
        assert gpus.loaded == []
        with pytest.raises(EngineError, match=r"unet: .*no engine .*--component unet --profile 128x64:b1"):
            pipe(**{**ASKED, **HYBRID, "placement": "auto", "height": 64})


def test_an_unguided_row_needs_an_engine_too(built: Callable[..., Path], gpus: Gpus) -> None:
    """Which engines for both branches in one call alone are not."""
    with pytest.raises(EngineError, match=r"unet_small: .*is outside"):
        painted(built(GUIDED), placement="auto", guidance_interval=(0.0, 0.5), **HYBRID)
    assert gpus.wrong == []


@pytest.mark.parametrize(
    ("devices", "whole", "steps"), [(None, True, True), ((0, 1), True, False), ((0, 1), False, True)]
)
def test_auto_passes_over_step_engines_where_a_second_gpu_can_run_a_branch(
    tmp_path: Path, gpus: Gpus, devices: tuple[int, ...] | None, whole: bool, steps: bool
) -> None:
    """whole: whether there are engines of the denoisers themselves."""
    write_tiny_bundle(tmp_path / "bundle")
    denoisers = HYBRID["steps"] if whole else ()
    write_engines(tmp_path / "cache", tmp_path / "bundle", "sm89", "text_encoder", "vae_decoder", *denoisers)
    write_variants(tmp_path, {name: [Variant(step="guided")] for name in HYBRID["steps"]})
    out = painted(tmp_path, devices=devices, placement="auto", **HYBRID)
    assert (out.timings.step_engines, bool(out.timings.tried)) == (steps, not steps)
    told = "" if steps else "placement auto on two GPUs takes no step engines"
    assert {one.unasked for one in out.timings.ran_on["unet"]} == {told}
    require_same_pictures(out, painted(tmp_path, "onnxruntime:cpu", **HYBRID))
    assert gpus.wrong == []
