"""The files that models run on, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import cache_folder, engines_folder
from tandemrt.runtime.engine_files import read_sidecar
from tandemrt.runtime.onnx_files import external_files
from tandemrt.runtime.ran_on import RanOn


def stored_bytes(bundle: Bundle, name: str) -> int:
    """A bundle's graph of a component, and the weights beside it."""
    model = bundle.model_path(name)
    files = (model, *(model.parent / one for one in external_files(model)))
    return sum(path.stat().st_size for path in files)


def ran_bytes(bundle: Bundle, name: str, ran: Iterable[RanOn], cache: str | Path | None) -> int:
    """What a component ran on: engines of the cache, the bundle's graph, or both, each once.

    Raises:
        EngineError: an engine's sidecar can no longer be read.
    """
    folder = engines_folder(cache_folder(cache))
    engines = {one.engine for one in ran}
    return sum(
        stored_bytes(bundle, name) if engine is None else read_sidecar(folder / engine).size_bytes for engine in engines
    )
