"""Having an engine: from the cache where it is there, else built by a process of its own and published whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..runtime.cache import engines_folder
from ..runtime.engine_files import FORMAT, Engine, Ingredients, InputRange, Layer, cached_engines
from ..runtime.errors import BundleError, CacheFullError, EngineError
from ..runtime.targets import ENGINES_ONLY
from ..runtime.variant import PLAIN
from .cache import Claim, cached, claimed, records_of, too_full
from .estimate import estimated_size_bytes
from .job import Job, Progress
from .plan import Request
from .process import build_apart

# What two engines have in common of which one takes the other's place, beside component and backend.
_KIND = ("device", "precision", "variant")
# A file system with less than this has no room for anything.
_NEXT_TO_NOTHING_BYTES = 64 << 10


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
        UntrustedError: others could have written to the cache, or to the engine asked for.
        TargetError: the target is not available here.
    """
    found = cached(cache, request.key)
    if found is not None:
        return Outcome(request, *found, built=False)
    with claimed(cache, request.key, progress) as claim:
        found = cached(cache, request.key)
        if found is not None:
            return Outcome(request, *found, built=False)
        engine, layers = _built(request, cache, claim, progress, versions)
        return Outcome(request, claim.publish(engine, layers), engine, built=True)


def _built(
    request: Request, cache: Path, claim: Claim, progress: Progress, versions: Mapping[str, str]
) -> tuple[Engine, tuple[Layer, ...]]:
    made_of, needed_bytes = request.ingredients, 0
    with suppress(OSError):  # the builder says what it does not find
        needed_bytes = estimated_size_bytes(request)
    if (full := too_full(claim.part.parent, needed_bytes)) is not None:
        raise full
    began = time.monotonic()
    graph = claim.part / "graph"
    job = _job(request, _graph(request, graph), claim.part, cache)
    try:
        built = build_apart(job, progress, inherited=(claim.lock,))
    except EngineError as error:
        if (full := _filled(claim, needed_bytes)) is not None:
            raise full from error
        raise
    taken_s = time.monotonic() - began
    work, work_error = _work(request, Path(job.model))
    shutil.rmtree(graph, ignore_errors=True)
    engine = Engine(
        format=FORMAT,
        component=request.component,
        ingredients=made_of,
        files=records_of(claim.part, built.files),
        inputs=request.facts.inputs,
        outputs=request.facts.outputs,
        profile_names=request.profile_names,
        profile_memory_bytes=built.profile_memory_bytes,
        layer_count=len(built.layers),
        multiply_adds=work,
        multiply_adds_error=work_error,
        build_s=round(taken_s, 3),
        peak_memory_bytes=built.peak_memory_bytes,
        versions={**versions, **built.versions},
    )
    return engine, built.layers


def _job(request: Request, model: Path, folder: Path, cache: Path) -> Job:
    """What the builder is told: to build from `model` into `folder`."""
    made_of = request.ingredients
    return Job(
        component=request.component,
        model=str(model),
        folder=str(folder),
        backend=made_of.backend,
        device=made_of.device,
        precision=made_of.precision,
        profiles=made_of.profiles,
        flags=made_of.flags,
        timings=str(timings_file(cache, made_of)) if made_of.backend == "tensorrt" else None,
    )


def _filled(claim: Claim, needed_bytes: int) -> CacheFullError | None:
    """What tells that the cache has no room left: builders that write tell it in words of their own, if at all."""
    written_bytes = sum(path.stat().st_size for path in claim.part.iterdir() if path.is_file())
    return too_full(claim.part.parent, max(needed_bytes - written_bytes, _NEXT_TO_NOTHING_BYTES))


def _work(request: Request, graph: Path) -> tuple[dict[str, int], str]:
    """The graph's multiply-adds by block or, where they cannot be counted, none and why."""
    from .blocks import work_by_block  # noqa: PLC0415 (onnx, of the extra `engines`)

    try:
        return work_by_block(graph, request.shapes, request.component), ""
    except BundleError as error:  # the engine is built, and serves without
        return {}, error.without_remedy


def timings_file(cache: Path, made_of: Ingredients) -> Path:
    """Where in a cache the times lie that TensorRT measured of its kernels, for this version and these GPUs."""
    return cache / "timings" / f"{made_of.backend}-{made_of.backend_version}-{made_of.device}.bin"


def _graph(request: Request, folder: Path) -> Path:
    """The graph to build from, made in `folder` where it is not the bundle's own."""
    made_of, weights = request.ingredients, request.model.parent
    in_bfloat16 = made_of.precision == "bf16" and made_of.backend in ENGINES_ONLY
    if made_of.variant == PLAIN and not in_bfloat16:
        return request.model
    from onnx import TensorProto  # noqa: PLC0415 (of the extra `engines`)

    from .composed import composed  # noqa: PLC0415
    from .graph_files import write_graph  # noqa: PLC0415
    from .retyped import write_retyped  # noqa: PLC0415

    graph = composed(request.model, made_of.variant, request.component, hands=made_of.backend in ENGINES_ONLY)
    if in_bfloat16:
        return write_retyped(graph, TensorProto.BFLOAT16, folder, weights)
    return write_graph(graph, folder, weights)


def changes(request: Request, cache: Path) -> tuple[str, ...] | None:
    """What differs from the engine in the cache that this one takes the place of; none where it is there itself.

    That is one of the component on the same target, in the same variant. None where the cache has no such engine.

    Raises:
        UntrustedError: others could have written to the cache, or to the engine asked for.
    """
    if cached(cache, request.key) is not None:
        return ()
    place = engines_folder(cache) / request.key
    if os.path.lexists(place):
        return (f"the engine in {place} is damaged",)
    differing = (tuple(_differences(one, request)) for one in _comparable(request, cache) if not _other(one, request))
    return min(differing, key=len, default=None)


def nearest(request: Request, cache: Path) -> str | None:
    """The nearest engine in the cache where `changes` has none to compare with, such as `plain for openvino:cpu:fp32`.

    Near are those of the component for the backend, nearer those that have more of `_KIND` in common. None where there
    is none.

    Raises:
        UntrustedError: others could have written to the cache.
    """
    near = min(_comparable(request, cache), key=lambda engine: len(_other(engine, request)), default=None)
    if near is None:
        return None
    made_of = near.ingredients
    of_another = ", of another graph and weights" if _other_model(near, request) else ""
    return f"{made_of.variant} for {made_of.backend}:{made_of.device}:{made_of.precision}{of_another}"


def _comparable(request: Request, cache: Path) -> Iterator[Engine]:
    """The engines in the cache of a component of the same name for the same backend."""
    wanted = request.component, request.ingredients.backend
    for _, engine in cached_engines(cache):
        if isinstance(engine, Engine) and (engine.component, engine.ingredients.backend) == wanted:
            yield engine


def _other(engine: Engine, request: Request) -> list[str]:
    """What tells that an engine is something else than what is wanted, and not what it was before a change."""
    there, wanted = engine.ingredients, request.ingredients
    names = [name for name in _KIND if str(getattr(there, name)) != str(getattr(wanted, name))]
    return names + ["model"] * _other_model(engine, request)


def _other_model(engine: Engine, request: Request) -> bool:
    """Whether an engine is of another model: where one changes, a part stays, be it the graph or the weights."""
    there, wanted = engine.ingredients, request.ingredients
    return there.origin != wanted.origin and there.weights != wanted.weights


def _differences(there: Engine, request: Request) -> Iterator[str]:
    """What is another in what is wanted, in plain words."""
    before, after = (msgspec.structs.asdict(one) for one in (there.ingredients, request.ingredients))
    for name in before:
        if before[name] == after[name] or name == "origin":
            continue
        if name == "graph" and before["variant"] != after["variant"] and before["origin"] == after["origin"]:
            continue  # it is another since something else was made of the bundle's
        if name == "weights":
            yield "the weights changed"
        elif name == "graph":
            yield f"the graph changed (sha256 {before[name][:12]} there, {after[name][:12]} now)"
        elif name == "profiles":
            yield from _other_profiles(there, request)
        elif name == "flags":
            keys = [key for key in {**before[name], **after[name]} if before[name].get(key) != after[name].get(key)]
            yield f"options of the builder changed ({', '.join(sorted(keys))})"
        elif str(before[name]) == str(after[name]):
            yield f"what was made of the graph changed ({after[name]}: others)"
        else:
            yield f"the {name.replace('_', ' ')} changed ({before[name]} there, {after[name]} now)"


def _other_profiles(there: Engine, request: Request) -> Iterator[str]:
    """How the profiles differ: by their names or, where these are the same, by the shapes of inputs that both have."""
    if there.profile_names != request.profile_names:
        yield f"the profiles changed ({_named(there.profile_names)} there, {_named(request.profile_names)} now)"
        return
    pairs = zip(there.ingredients.profiles, request.ingredients.profiles, strict=False)
    shapes = [
        f"{name} {before[name]} there, {after[name]} now"
        for before, after in pairs
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    if shapes:
        yield f"the profiles' shapes changed ({', '.join(shapes)})"


def _named(profiles: Sequence[str]) -> str:
    return " and ".join(profiles) or "every shape"


def described(ranges: Mapping[str, InputRange]) -> str:
    """The ranges of a profile in one line, such as `sample (1..2, 4, 64, 64)`."""
    return ", ".join(f"{name} {one}" for name, one in ranges.items())
