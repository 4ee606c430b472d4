"""Update engines beside LoRAs, inpainting denoisers' windows, GPUs that do not reach each other, and bf16."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.composed import composed_stages
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.runtime import Output, Pipeline
from tandemrt.runtime.backends import tensorrt
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import REFIT, read_layers
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.onnx_files import projections
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import PLAIN, UPDATE, Variant

from ..runtime import stand_in_gpus
from ..runtime.engine_writing import write_engines
from ..runtime.lora_writing import write_lora
from ..runtime.stand_in_gpus import Gpus, stand_in
from ..runtime.tiny_bundle import encoder, resign, write_tiny_bundle
from .on_gpus import (
    ASKED,
    LATENT_BYTES,
    PICTURE_BYTES,
    SIDE,
    TARGET,
    copied,
    on_update_engines,
    painted,
    require_same,
    write_cut_bundle,
    write_variants,
    written,
)
from .tandem import PLACED, ROWS, WINDOW
from .test_retyped import halved

SLOTS = Variant(lora_slots=2, lora_rank=2)
ENCODED_BYTES = 2 * LATENT_BYTES  # what an encoder makes of a picture: means and variances
HYBRID: dict[str, Any] = {"steps": {"unet": 3, "unet_small": 2}}
ADAPTIVE: dict[str, Any] = {"guidance": "adaptive", "guidance_config": {"threshold": 10.0, "steady": 1e6, "probe": 3}}
PLACEMENTS: list[tuple[dict[str, Any], tuple[int, ...] | None]] = [
    ({"placement": "sequential"}, None),
    ({"placement": "parallel"}, None),
    ({"placement": "parallel"}, (0, 1)),
    ({"placement": "batched", **ADAPTIVE}, None),
]


def with_updates(folder: Path, *denoisers: str) -> Path:
    """What a folder has, and in `host` a cache like `cache` but without update engines, which are added to that."""
    shutil.copytree(folder / "cache", folder / "host")
    write_variants(folder, dict.fromkeys(denoisers, (UPDATE,)))
    return folder


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89", "sm89")


def require_same_as_on_the_host(folder: Path, gpus: Gpus, **arguments: Any) -> Output:
    """Paint on update engines, and with guidance and the solver on the host; returns the former's output."""
    expected = painted(folder, cache="host", **arguments)
    assert not on_update_engines(expected)
    gpus.copies.clear()
    out = painted(folder, **arguments)
    assert on_update_engines(out)
    assert [size for size in copied(gpus, "DeviceToHost") if size != ENCODED_BYTES] == [LATENT_BYTES, PICTURE_BYTES]
    require_same(out, expected)
    assert gpus.wrong == []
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With engines of one denoiser that have slots, a step engine of it, and two files of LoRAs."""
    folder = written(tmp_path_factory.mktemp("tuned"), write_tiny_bundle, {"unet": [SLOTS, Variant(step="guided")]})
    modules = {"unet": projections(folder / "bundle" / "unet" / "model.onnx")}
    for rank in (1, 2):
        write_lora(folder / f"{rank}.safetensors", modules, rank=rank, seed=rank, size=0.4)
    return with_updates(folder, "unet", "unet_small")


def lora_sets(folder: Path) -> list[dict[Path, float]]:
    """From the base to one, to the other, to both, and back."""
    one, other = (folder / f"{rank}.safetensors" for rank in (1, 2))
    return [{}, {one: 0.8}, {other: 0.5}, {one: 0.8, other: -0.5}, {}]


def walked(folder: Path, cache: str, devices: tuple[int, ...] | None, **arguments: Any) -> list[Output]:
    """What one pipeline paints with each set of LoRAs."""
    with Pipeline.open(folder / "bundle", TARGET, cache=folder / cache, threads=1, devices=devices) as pipe:
        return [pipe(**{**ASKED, **HYBRID, **arguments}, loras=loras) for loras in lora_sets(folder)]


def require_same_walk(folder: Path, gpus: Gpus, devices: tuple[int, ...] | None, **arguments: Any) -> list[Output]:
    walks = [walked(folder, cache, devices, **arguments) for cache in ("cache", "host")]
    for out, expected in zip(*walks, strict=True):
        assert (on_update_engines(out), on_update_engines(expected)) == (True, False)
        require_same(out, expected)
    first, *_, last = walks[0]
    np.testing.assert_array_equal(last.latents, first.latents)
    assert min(np.abs(out.latents - first.latents).max() for out in walks[0][1:-1]) > 1e-3
    assert gpus.wrong == []
    return walks[0]


@pytest.mark.parametrize(("asked", "devices"), PLACEMENTS, ids=str)
def test_loras_in_slots_come_and_go(
    tuned: Path, gpus: Gpus, asked: Mapping[str, Any], devices: tuple[int, ...] | None
) -> None:
    walk = require_same_walk(tuned, gpus, devices, **asked)
    variants = [{one.variant for one in out.timings.ran_on["unet"]} for out in walk]
    assert variants == [{made, "update"} for made in ("plain", *[str(SLOTS)] * 3, "plain")]


def test_update_engines_are_told_of_that_who_looks_on_leaves_unused(tuned: Path, gpus: Gpus) -> None:
    steps, updates = "placement sequential takes no step engines", "observe takes no update engines"
    for cache, told in (("cache", f"{steps}; {updates}"), ("host", steps)):
        folder, seen = tuned / cache, set[str]()
        with Pipeline.open(tuned / "bundle", TARGET, cache=folder, observe=lambda name, _: seen.add(name)) as pipe:  # noqa: B023
            ran = pipe(**ASKED, steps={"unet": 2}, placement="sequential").timings.ran_on
        assert "unet" in seen
        assert {(one.variant, one.unasked, one.refused) for one in ran["unet"]} == {("plain", told, ())}
        assert {one.unasked for one in ran["vae_decoder"]} == {""}


class Refittable(stand_in_gpus._Engine):
    """An engine of the stand-ins that keeps its graph, and can be given other weights."""

    def __init__(self, gpus: Gpus, graph: bytes) -> None:
        super().__init__(gpus, graph)
        self.model = onnx.load_from_string(graph)

    def reload(self) -> None:
        options = {"providers": ["CPUExecutionProvider"]}
        self.session = type(self.session)(self.model.SerializeToString(), **options)


class Refitter:
    """Stands for TensorRT's."""

    def __init__(self, engine: Refittable, _: Any) -> None:
        self._engine = engine
        self._weights = {one.name: one for one in engine.model.graph.initializer}

    def get_all_weights(self) -> list[str]:
        return list(self._weights)

    def get_missing_weights(self) -> list[str]:
        return []

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self._weights[name].CopyFrom(numpy_helper.from_array(weights, name))
        return True

    def refit_cuda_engine(self) -> bool:
        self._engine.gpus.check_current("a refit", self._engine.gpu)
        self._engine.reload()
        return True


@pytest.mark.parametrize(("asked", "devices"), PLACEMENTS, ids=str)
def test_loras_in_the_weights_come_and_go(
    tuned: Path,
    gpus: Gpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Mapping[str, Any],
    devices: tuple[int, ...] | None,
) -> None:
    flavour = gpus.flavour
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda graph: Refittable(gpus, graph))
    flavour.Runtime, flavour.Refitter, flavour.Weights = lambda _: runtime, Refitter, lambda weights: weights
    monkeypatch.setattr(tensorrt, "imported", lambda _: flavour)
    for name in ("1.safetensors", "2.safetensors"):
        shutil.copy(tuned / name, tmp_path)
    others = write_tiny_bundle(tmp_path / "bundle").components.keys() - {"unet"}
    write_engines(tmp_path / "cache", tmp_path / "bundle", "sm89", *others)
    write_variants(tmp_path, {"unet": [PLAIN]}, flags={REFIT: True})
    walk = require_same_walk(with_updates(tmp_path, "unet", "unet_small"), gpus, devices, **asked)
    variants = [{one.variant for one in out.timings.ran_on["unet"]} for out in walk]
    assert variants == [{made, "update"} for made in ("plain", *["refitted"] * 3, "plain")]


@pytest.fixture(scope="module")
def inpainting(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With stages of a denoiser that reads a mask and what it leaves of a picture behind the latent."""
    encodes, model = encoder("vae_encoder", seed=5, output="latent_parameters"), exported("inpainting")
    folder = tmp_path_factory.mktemp("inpainting")
    written(folder, lambda made: write_cut_bundle(made, model, vae_encoder=encodes), {})
    write_variants(folder, {"unet": list(composed_stages(Bundle.open(folder / "bundle"), "unet", PLAIN, 2))})
    return with_updates(folder, "unet")


@pytest.mark.parametrize(
    ("placement", "devices", "peers"),
    [("parallel", (0, 1), False), ("hybridiff", None, True), ("hybridiff", (0, 1), False)],
    ids=str,
)
def test_an_inpainting_denoisers_channels_lie_behind_the_latent(
    inpainting: Path, gpus: Gpus, placement: str, devices: tuple[int, ...] | None, peers: bool
) -> None:
    """In its stages too; on two GPUs, what the second one makes comes through the host where they cannot reach."""
    gpus.peers = peers
    pixels = np.random.default_rng(1).integers(0, 256, (8 * SIDE, 8 * SIDE, 3), np.uint8)
    mask = np.zeros((8 * SIDE, 8 * SIDE), np.uint8)
    mask[:, : 4 * SIDE] = 255
    given: dict[str, Any] = {"image": pixels, "mask_image": mask, "strength": 1.0, "num_inference_steps": ROWS}
    if placement == "hybridiff":
        given["placement_config"] = {**WINDOW, "stride": 2}
    out = require_same_as_on_the_host(inpainting, gpus, placement=placement, devices=devices, **given)
    placed = PLACED[2] if placement == "hybridiff" else ["parallel"] * ROWS
    assert [row.placement for row in out.plan.ran] == placed
    kind, other = ("direct", "staged") if peers else ("staged", "direct")
    assert bool(gpus.copied[kind]) == bool(devices)
    assert gpus.copied[other] == 0
    if devices and placement == "parallel":  # each row's sample for the second GPU, of 9 channels, and its prediction
        assert gpus.copied[kind] == ROWS * (9 + 4) * LATENT_BYTES // 4


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp16, and of its engines those that stand for bf16 ones."""
    folder = tmp_path_factory.mktemp("half")
    write_tiny_bundle(folder / "bundle")
    for name in ("unet", "unet_small"):
        model = onnx.load(folder / "bundle" / name / "model.onnx")
        halved(model)
        onnx.save(model, folder / "bundle" / name / "model.onnx")

    def stated(manifest: Manifest) -> Manifest:
        parts = manifest.components.items()
        half = {name: msgspec.structs.replace(one, precision="fp16") for name, one in parts}
        return msgspec.structs.replace(manifest, components=half)

    resign(folder / "bundle", stated)
    return folder


def test_engines_in_bf16_have_update_engines_of_their_own(half: Path, gpus: Gpus) -> None:
    bundle = Bundle.open(half / "bundle")
    for cache, variants in (("host", (PLAIN,)), ("cache", (PLAIN, UPDATE))):
        denoisers = dict.fromkeys(("unet", "unet_small"), variants)
        others = dict.fromkeys(bundle.manifest.components.keys() - denoisers, (PLAIN,))
        write_variants(half, {**denoisers, **others}, cache, precision="bf16")
    for asked in ({"placement": "sequential"}, {"placement": "parallel", **ADAPTIVE}):
        require_same_as_on_the_host(half, gpus, target="tensorrt-rtx:sm89:bf16", **HYBRID, **asked)
    write_variants(half, {name: [PLAIN] for name in bundle.manifest.components}, precision="fp16")
    assert not on_update_engines(painted(half, "tensorrt-rtx:sm89:fp16", placement="sequential", **HYBRID))


def test_tensorrt_builds_update_engines_in_fp32_whatever_the_denoisers_compute_in(half: Path, tmp_path: Path) -> None:
    bundle, target = Bundle.open(half / "bundle"), parse_target("tensorrt-rtx:sm89:bf16")
    denoiser, update = requests_of(BuildPlan(bundle.path, (target,), tmp_path, ("unet",)), bundle)
    assert [one.ingredients.precision for one in (denoiser, update)] == ["bf16"] * 2
    layers = read_layers(ensure_engine(update, tmp_path, lambda label, done, total: None, {}).folder)
    assert {one.precision for one in layers} <= {"float", ""}
