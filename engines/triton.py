"""A bundle as a model repository of Triton Inference Server: each component a model, an ONNX graph or a TensorRT plan.

    <out>/tandem-triton.json                    what is here and of which bundle; Triton reads folders alone
    <out>/<component>/config.pbtxt              see `triton_config`
    <out>/<component>/1/model.onnx              or a folder of this name, with the graph and the files of its weights
    <out>/<component>/1/model.plan

Weights are copied, some MiB at a time and compared with their digests: a hard link would be a second name of the
bundle's own files, which is refused as long as it is there.
"""

from __future__ import annotations

import hashlib
import posixpath
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..runtime.build_commands import build_command
from ..runtime.bundle import Bundle
from ..runtime.cache import cache_folder
from ..runtime.engine_files import (
    RECIPES,
    VERSION_COMPATIBLE,
    Engine,
    InputRange,
    cached_engines,
    check_engine_files,
    origin_of,
    weights_of,
)
from ..runtime.engine_search import answers
from ..runtime.errors import BundleError, EngineError, ExportError
from ..runtime.manifest import FileRecord, Frozen
from ..runtime.onnx_files import external_files, graph_tensors
from ..runtime.staging import Kind, Staging, writing_failed
from ..runtime.targets import Target
from ..runtime.variant import PLAIN
from .ingredients import exact_target
from .profiles import Profile, guided_by_default, input_ranges
from .triton_config import Model, config

FORMAT = 1
RECORD_NAME = "tandem-triton.json"
MAX_RECORD_BYTES = 4 << 20
VERSION = "1"
_BOTH_BRANCHES = ("text_encoder", "denoiser", "controlnet")
_CHUNK = 4 << 20
Progress = Callable[[str, int, int], None]
Ranges = Mapping[str, InputRange]


class Served(Frozen, frozen=True, kw_only=True):
    """A model of a repository: for which target, and of a plan which engine, by its key, and version of TensorRT."""

    target: str
    engine: str | None = None
    tensorrt: str | None = None


class Record(Frozen, frozen=True, kw_only=True):
    """What `tandem-triton.json` says: of which bundle, by its digest, the models are, and which files there are."""

    format: int
    bundle: str
    models: dict[str, Served]
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Source:
    """A component with what Triton is told of it, and the files of its version by their paths there."""

    model: Model
    target: Target
    files: Mapping[str, tuple[Path, FileRecord]]
    engine: Engine | None = None

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(record.size for _, record in self.files.values())

    @property
    def served(self) -> Served:
        made_of = None if self.engine is None else self.engine.ingredients
        if made_of is None:
            return Served(target=str(self.target))
        return Served(target=str(self.target), engine=made_of.key, tensorrt=made_of.backend_version)

    @property
    def version_compatible(self) -> bool:
        """Whether it is a plan that newer versions of TensorRT of the same major run too."""
        return self.engine is not None and bool(self.engine.ingredients.flags.get(VERSION_COMPATIBLE))


def source_of(bundle: Bundle, name: str, target: Target, profiles: Iterable[Profile], cache: Path | None) -> Source:
    """A component as it is served on a target: its graph, or a plan from the cache that takes these profiles' calls.

    Raises:
        TargetError: the component is not in the precision that the target asks for.
        ArgumentError: a profile is outside the model.
        BundleError: the graph is not the one that the manifest describes, or its weights lie outside its folder.
        EngineError: the cache has no such plan, or several of different versions of TensorRT.
    """
    exact = exact_target(target, name, bundle)
    if target.backend == "tensorrt":
        return _plan_source(bundle, name, exact, tuple(profiles), cache)
    return _graph_source(bundle, name, exact, profiles)


def repository(bundle: Bundle, sources: Mapping[str, Source], out: Path, *, force: bool, progress: Progress) -> Record:
    """Write the repository, whole or not at all; what it says of itself.

    force: replace a repository that is at `out`, if nothing else is in it.

    Raises:
        ExportError: `out` is taken or cannot be written, or a file changed while it was copied.
    """
    with Staging(out, force=force, kind=REPOSITORY) as staging:
        try:
            record = _written(bundle, sources, staging.folder, progress)
        except OSError as error:
            raise writing_failed(staging.out, error) from error
        staging.publish()
    return record


def _graph_source(bundle: Bundle, name: str, target: Target, profiles: Iterable[Profile]) -> Source:
    component, path = bundle.component(name), bundle.model_path(name)
    inputs, outputs = graph_tensors(path)
    bundle.check_tensors(name, inputs, outputs)
    both = component.role in _BOTH_BRANCHES
    guided = guided_by_default(bundle.manifest, component)
    largest = [profile.points(guided_by_default=guided)[2] for profile in profiles]
    most = max(point.images * (1 + (both and point.guided)) for point in largest)
    return Source(
        Model(name, "onnxruntime", inputs, outputs, most, gpu=target.device == "cuda"),
        target,
        dict(_graph_files(bundle, name)),
    )


def _graph_files(bundle: Bundle, name: str) -> Iterator[tuple[str, tuple[Path, FileRecord]]]:
    """The files of a graph; Triton has one of several files in a folder, under the name of the one it would be."""
    model, files = bundle.component(name).model, bundle.manifest.files
    locations = sorted(external_files(bundle.path / model))
    place = "model.onnx/model.onnx" if locations else "model.onnx"
    yield place, (bundle.path / model, files[model])
    for location in locations:
        beside = posixpath.normpath(location)
        if beside.startswith("../") or beside == "model.onnx":
            expected = "files in the graph's folder, or below it"
            raise BundleError(str(bundle.path / model), "file of weights", got=location, expected=expected)
        source = posixpath.normpath(posixpath.join(posixpath.dirname(model), location))
        yield f"model.onnx/{beside}", (bundle.path / source, files[source])


def _plan_source(
    bundle: Bundle, name: str, target: Target, profiles: tuple[Profile, ...], cache: Path | None
) -> Source:
    component, manifest = bundle.component(name), bundle.manifest
    calls = [input_ranges(name, component, manifest, profile) for profile in profiles]
    folder, engine = _plan(bundle, name, target, calls, cache, _remedy(bundle, name, target, profiles, cache))
    check_engine_files(folder, engine)
    ranges = engine.ingredients.profiles
    model = Model(
        name,
        "tensorrt",
        engine.inputs,
        engine.outputs,
        most=max(min(one.max[0] for one in each.values()) for each in ranges),
        preferred=tuple(sorted({min(one.opt[0] for one in each.values()) for each in ranges})),
        gpu=True,
        profiles=len(ranges),
        parameters={
            "tensorrt_version": engine.ingredients.backend_version,
            **{f"profile_{index}": called for index, called in enumerate(engine.profile_names)},
        },
    )
    ((file, record),) = engine.files.items()
    return Source(model, target, {"model.plan": (folder / file, record)}, engine)


def _plan(
    bundle: Bundle, name: str, target: Target, calls: list[dict[str, InputRange]], cache: Path | None, remedy: str
) -> tuple[Path, Engine]:
    """The plan with the narrowest profiles that take these calls."""
    origin, weights = origin_of(bundle, name), weights_of(bundle, name)
    place = cache_folder(cache)
    fitting, why = [], []
    for folder, engine in cached_engines(place):
        if isinstance(engine, EngineError):
            why.append(engine.without_remedy)
            continue
        made_of = engine.ingredients
        if (made_of.origin, made_of.weights, made_of.backend) != (origin, weights, target.backend):
            continue
        if made_of.variant != PLAIN or made_of.recipe != RECIPES[target.backend] or not answers(made_of, target):
            continue
        if all(any(_takes(one, call) for one in made_of.profiles) for call in calls):
            fitting.append((folder, engine))
        else:
            why.append(f"{folder.name[:12]} has no profile for every call")
    if not fitting:
        told = "; ".join(why) or "there is none"
        raise EngineError(name, f"no plan for {target} fits: {told} (in {place})", remedy=remedy)
    versions = sorted({engine.ingredients.backend_version for _, engine in fitting})
    if len(versions) > 1:
        remedy = "Give a --cache with those of the version that Triton brings alone."
        raise EngineError(name, "plans of several versions of TensorRT fit", got=", ".join(versions), remedy=remedy)
    return min(fitting, key=lambda found: (_width(found[1]), found[0].name))


def _takes(ranges: Ranges, call: Ranges) -> bool:
    """Whether a profile takes all that another one does."""
    return ranges.keys() == call.keys() and all(
        ranges[name].holds(one.min) and ranges[name].holds(one.max) for name, one in call.items()
    )


def _width(engine: Engine) -> int:
    """How much more than one call an engine takes."""
    return sum(
        high - low
        for ranges in engine.ingredients.profiles
        for one in ranges.values()
        for low, high in zip(one.min, one.max, strict=True)
    )


def _remedy(bundle: Bundle, name: str, target: Target, profiles: Iterable[Profile], cache: Path | None) -> str:
    command = build_command(bundle, name, target, PLAIN, cache=cache)
    return f"Run `{command}{''.join(f' --profile {shlex.quote(str(profile))}' for profile in profiles)}`."


def _written(bundle: Bundle, sources: Mapping[str, Source], folder: Path, progress: Progress) -> Record:
    files: dict[str, FileRecord] = {}
    for index, (name, source) in enumerate(sources.items()):
        progress("copying models", index, len(sources))
        for place, (path, record) in source.files.items():
            whole = f"{name}/{VERSION}/{place}"
            (folder / whole).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, folder / whole, record)
            files[whole] = record
        text = config(source.model).encode()
        (folder / name / "config.pbtxt").write_bytes(text)
        files[f"{name}/config.pbtxt"] = FileRecord(size=len(text), sha256=hashlib.sha256(text).hexdigest())
    progress("copying models", len(sources), len(sources))
    models = {name: source.served for name, source in sources.items()}
    told = Record(format=FORMAT, bundle=bundle.digest, models=models, files=files)
    (folder / RECORD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
    return told


def _copy(source: Path, place: Path, record: FileRecord) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as read, place.open("xb") as written:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
    if digest.hexdigest() != record.sha256:
        what = "changed while it was copied"
        raise ExportError(str(source), what, got=digest.hexdigest(), expected=record.sha256, remedy="Run it again.")


def _files_of_repository(folder: Path) -> Iterable[str]:
    path = folder / RECORD_NAME
    with path.open("rb") as stream:
        raw = stream.read(MAX_RECORD_BYTES + 1)
    try:
        return (*msgspec.json.decode(raw, type=Record).files, RECORD_NAME)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExportError(str(path), f"not a repository's record ({error})") from error


REPOSITORY = Kind("repository", RECORD_NAME, _files_of_repository)
