"""Having an engine: from the cache where it is there, else built by a process of its own and published whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..runtime.engine_files import FORMAT, Engine, Ingredients, InputRange, cached_engines, engines_folder
from ..runtime.errors import EngineError
from ..runtime.variant import PLAIN
from .cache import Claim, cached, claimed, records_of
from .flavour import BACKENDS
from .job import Job, Progress
from .plan import Request
from .process import build_apart


@dataclass(frozen=True, slots=True)
class Outcome:
    """An engine in the cache, and whether it was built now."""

    request: Request = field(repr=False)
    folder: Path
    engine: Engine
    built: bool


def ensure_engine(request: Request, cache: Path, progress: Progress, versions: Mapping[str, str]) -> Outcome:
    """The engine that is asked for, built if it is not in the cache.

    Of several processes that ask at once one builds, the others wait for it. Whatever is raised meanwhile, the builder
    is killed and the cache left as it was. versions: of what is worth knowing besides the backend's.

    Raises:
        EngineError: it cannot be built, or the cache cannot be written.
        TargetError: the target is not available here.
    """
    found = cached(cache, request.key)
    if found is not None:
        return Outcome(request, *found, built=False)
    with claimed(cache, request.key, progress) as claim:
        found = cached(cache, request.key)
        if found is not None:
            return Outcome(request, *found, built=False)
        engine = _built(request, cache, claim, progress, versions)
        return Outcome(request, claim.publish(engine), engine, built=True)


def _built(request: Request, cache: Path, claim: Claim, progress: Progress, versions: Mapping[str, str]) -> Engine:
    made_of = request.ingredients
    began = time.monotonic()
    graph = claim.part / "graph"
    job = Job(
        component=request.component,
        model=str(_graph(request, graph)),
        folder=str(claim.part),
        backend=made_of.backend,
        device=made_of.device,
        precision=made_of.precision,
        profiles=made_of.profiles,
        flags=made_of.flags,
        timings=str(timings_file(cache, made_of)) if made_of.backend == "tensorrt" else None,
    )
    built = build_apart(job, progress, inherited=(claim.lock,))
    shutil.rmtree(graph, ignore_errors=True)
    return Engine(
        format=FORMAT,
        component=request.component,
        ingredients=made_of,
        files=records_of(claim.part, built.files),
        inputs=request.facts.inputs,
        outputs=request.facts.outputs,
        profile_names=request.profile_names,
        profile_memory_bytes=built.profile_memory_bytes,
        layers=built.layers,
        build_s=round(time.monotonic() - began, 3),
        peak_memory_bytes=built.peak_memory_bytes,
        versions={**versions, **built.versions},
    )


def timings_file(cache: Path, made_of: Ingredients) -> Path:
    """Where in a cache the times lie that TensorRT measured of its kernels, for this version and these GPUs."""
    return cache / "timings" / f"{made_of.backend}-{made_of.backend_version}-{made_of.device}.bin"


def _graph(request: Request, folder: Path) -> Path:
    """The graph to build from, made in `folder` where it is not the bundle's own."""
    made_of, weights = request.ingredients, request.model.parent
    in_bfloat16 = made_of.precision == "bf16" and made_of.backend in BACKENDS
    if made_of.variant == PLAIN and not in_bfloat16:
        return request.model
    from onnx import TensorProto  # noqa: PLC0415 (of the extra `engines`)

    from .composed import composed  # noqa: PLC0415
    from .graph_files import write_graph  # noqa: PLC0415
    from .retyped import write_retyped  # noqa: PLC0415

    graph = composed(request.model, made_of.variant, request.component)
    if in_bfloat16:
        return write_retyped(graph, TensorProto.BFLOAT16, folder, weights)
    return write_graph(graph, folder, weights)


def changes(request: Request, cache: Path) -> tuple[str, ...] | None:
    """What differs from the nearest engine of this component in the cache; none where that is the one asked for.

    None where the cache has no engine of the component for the backend at all.

    Raises:
        EngineError: the cache belongs to another user.
    """
    alike = [
        engine.ingredients
        for _, engine in cached_engines(cache)
        if not isinstance(engine, EngineError)
        and engine.component == request.component
        and engine.ingredients.backend == request.ingredients.backend
    ]
    if not alike:
        return None
    if cached(cache, request.key) is not None:
        return ()
    nearest = min((tuple(_differences(one, request.ingredients)) for one in alike), key=len)
    return nearest or (f"the engine in {engines_folder(cache) / request.key} is damaged",)


def _differences(there: Ingredients, wanted: Ingredients) -> Iterator[str]:
    """What is another in `wanted`, in plain words."""
    before, after = msgspec.structs.asdict(there), msgspec.structs.asdict(wanted)
    for name in before:
        if name == "weights" and before[name] != after[name]:
            yield "the weights changed"
        elif name in ("graph", "origin") and before[name] != after[name]:
            if name == "graph":
                yield f"the graph changed (sha256 {before[name][:12]} there, {after[name][:12]} now)"
        elif name == "profiles" and before[name] != after[name]:
            yield f"the profiles changed ({_shown(there)} there, {_shown(wanted)} now)"
        elif before[name] != after[name]:
            yield f"the {name.replace('_', ' ')} changed ({before[name]} there, {after[name]} now)"


def _shown(made_of: Ingredients) -> str:
    return " and ".join(map(described, made_of.profiles)) or "every shape"


def described(ranges: Mapping[str, InputRange]) -> str:
    """The ranges of a profile in one line, such as `sample (1..2, 4, 64, 64)`."""
    return ", ".join(f"{name} {one}" for name, one in ranges.items())
