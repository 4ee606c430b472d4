"""Bundles with engines for the stand-ins for GPUs, and what is painted on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from tandemrt.engines.composed import composed
from tandemrt.engines.graph_files import spec
from tandemrt.runtime import Output, Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.manifest import Component, TextConditioning, TextEncoding
from tandemrt.runtime.variant import PLAIN, Variant

from ..runtime.engine_writing import write_engine, write_engines
from ..runtime.stand_in_gpus import Gpus
from ..runtime.tiny_bundle import MAX_LENGTH, decoder, denoiser, text_encoder, write_bundle, write_tokenizer

TARGET = "tensorrt-rtx:sm89:fp32"
SIDE = 16
LATENT_BYTES = 4 * 4 * SIDE * SIDE
STATE_BYTES = 4 * LATENT_BYTES  # x, and three earlier predictions
PICTURE_BYTES = 3 * 4 * (8 * SIDE) ** 2
LARGE = (LATENT_BYTES, 2 * LATENT_BYTES, STATE_BYTES, PICTURE_BYTES)
ASKED: dict[str, Any] = {
    "prompt": "red",
    "negative_prompt": "blue",
    "seed": 7,
    "height": 8 * SIDE,
    "width": 8 * SIDE,
    "output_type": "np",
}
Variants = Mapping[str, Sequence[Variant]]


def written(folder: Path, write: Callable[[Path], Any], variants: Variants) -> Path:
    """A bundle, and beside it a cache with engines of all components for the stand-ins, and of these variants."""
    write(folder / "bundle")
    write_engines(folder / "cache", folder / "bundle", "sm89")
    write_variants(folder, variants)
    return folder


def write_variants(
    folder: Path, variants: Variants, cache: str = "cache", *, hands: bool = True, **others: Any
) -> None:
    """Further engines; hands: as of `composed`; others: of their ingredients."""
    bundle = Bundle.open(folder / "bundle")
    for name, variant in ((name, variant) for name, wanted in variants.items() for variant in wanted):
        graph = composed(bundle.model_path(name), variant, name, hands=hands)
        onnx.load_external_data_for_model(graph, str(bundle.model_path(name).parent))
        if variant != PLAIN:
            onnx.checker.check_model(graph, full_check=True)
        write_engine(folder / cache, bundle, name, "sm89", graph, variant, **others)


def painted(
    folder: Path,
    target: str = TARGET,
    *,
    cache: str = "cache",
    devices: tuple[int, ...] | None = None,
    streamed: bool = False,
    **arguments: Any,
) -> Output:
    """On the engines of a cache, or for another target on the bundle's graphs."""
    engines = folder / cache if target.startswith("tensorrt") else None
    with Pipeline.open(folder / "bundle", target, cache=engines, threads=2, devices=devices) as pipe:
        given = {**ASKED, **arguments}
        return pipe.stream(**given).result() if streamed else pipe(**given)


def on_update_engines(out: Output) -> bool:
    """Whether the rows ran on update engines, of all denoisers or none."""
    (made,) = {"update" in [one.variant for one in out.timings.ran_on[name]] for name in set(out.plan.denoisers)}
    return made


def require_same_pictures(out: Output, expected: Output, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(out.latents, expected.latents, atol=atol)
    np.testing.assert_allclose(np.stack(out.images), np.stack(expected.images), atol=atol)


def require_same(out: Output, expected: Output) -> None:
    """The pictures, and what is told of guidance, are those of the loop on the host."""
    require_same_pictures(out, expected, atol=2e-5)
    for one, other in zip(out.plan.ran, expected.plan.ran, strict=True):
        assert (one.guided, one.placement) == (other.guided, other.placement)
        for got, wanted in ((one.discrepancy, other.discrepancy), (one.growth, other.growth)):
            assert (got is None) == (wanted is None)
            np.testing.assert_allclose(got or 0.0, wanted or 0.0, rtol=1e-3)


def copied(gpus: Gpus, kind: str) -> list[int]:
    """The sizes of copies of this kind, as far as they are as large as latents, predictions, states or pictures."""
    return [size for one, size in gpus.copies if one == kind and size in LARGE]


def write_cut_bundle(folder: Path, model: Path, **more: tuple[onnx.ModelProto, Component]) -> None:
    """A bundle with a denoiser that can be cut into stages; more: of its components."""
    folder.mkdir()
    vocabulary, graph = write_tokenizer(folder / "tokenizer"), onnx.load(model)
    inputs, outputs = (tuple(spec(one, "unet") for one in values) for values in (graph.graph.input, graph.graph.output))
    width = int(next(one.shape[-1] for one in inputs if one.name == "encoder_hidden_states"))
    _, described = denoiser("unet", seed=1, hidden=8)
    components = {
        "text_encoder": text_encoder("text_encoder", vocabulary, width, ("last_hidden_state",)),
        "unet": (graph, msgspec.structs.replace(described, inputs=inputs, outputs=outputs, spatial_multiple=4)),
        "vae_decoder": decoder("vae_decoder", seed=3, hidden=8),
        **more,
    }
    text = TextConditioning(encoders={"text_encoder": TextEncoding(max_length=MAX_LENGTH, width=width)}, width=width)
    write_bundle(folder, components, text)
