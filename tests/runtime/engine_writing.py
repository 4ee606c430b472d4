"""Engines for the stand-in GPUs, in a cache, as engines of TensorRT for RTX are kept there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import onnx

from tandemrt.engines.graph_files import spec
from tandemrt.runtime.architecture import system_architecture
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.engine_files import (
    FORMAT,
    RECIPES,
    SIDECAR_NAME,
    Engine,
    Ingredients,
    origin_of,
    weights_of,
)
from tandemrt.runtime.manifest import FileRecord
from tandemrt.runtime.targets import installed_version
from tandemrt.runtime.variant import PLAIN, Variant

BACKEND = "tensorrt-rtx"


def write_engines(cache: Path, bundle: Path, device: str, *names: str) -> None:
    """Engines for the stand-ins of a bundle's components, all of them or those named."""
    opened = Bundle.open(bundle)
    for name in names or tuple(opened.manifest.components):
        write_engine(cache, opened, name, device, onnx.load(opened.model_path(name)))


def write_engine(
    cache: Path,
    bundle: Bundle,
    name: str,
    device: str,
    model: onnx.ModelProto,
    variant: Variant = PLAIN,
    **others: Any,
) -> None:
    """One engine for the stand-ins: a graph, with its weights; others: of its ingredients."""
    graph = model.SerializeToString()
    ingredients = Ingredients(
        graph=hashlib.sha256(graph).hexdigest(),
        weights=weights_of(bundle, name),
        origin=origin_of(bundle, name),
        variant=variant,
        profiles=(),
        backend=BACKEND,
        backend_version=installed_version(BACKEND),
        device=device,
        architecture=system_architecture(),
        precision=bundle.component(name).precision,
        flags={},
        recipe=RECIPES[BACKEND],
    )
    ingredients = msgspec.structs.replace(ingredients, **others)
    engine = Engine(
        format=FORMAT,
        component=name,
        ingredients=ingredients,
        files={"model.engine": FileRecord(size=len(graph), sha256=ingredients.graph)},
        inputs=tuple(spec(value, name) for value in model.graph.input),
        outputs=tuple(spec(value, name) for value in model.graph.output),
        profile_names=(),
        build_s=0.0,
        peak_memory_bytes=0,
        versions={},
    )
    folder = engines_folder(cache) / ingredients.key
    folder.mkdir(parents=True)
    (folder / "model.engine").write_bytes(graph)
    (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(engine))
