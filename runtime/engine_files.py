"""Engines in the user's cache: the sidecar `engine.json` beside each, and how the one that fits a call is found.

    <cache>/engines/<key>/engine.json    with the engine's files beside it

An engine is native code that a backend runs as it is: engines are read from the user's own cache alone, never from a
bundle, and a digest in the sidecar proves that a file is the one that was built, not who built it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from .architecture import cpu_architecture, system_architecture
from .build_commands import build_command
from .bundle import Bundle
from .errors import EngineError
from .manifest import FileRecord, Frozen, TensorSpec, file_sha256
from .onnx_files import external_files
from .targets import PORTABLE, Target, installed_version
from .variant import PLAIN, Variant

FORMAT = 1
SIDECAR_NAME = "engine.json"
GRAPH_NAME = "model.onnx"  # what an engine of ONNX Runtime consists of, weights beside it
PROOF_NAME = "proof.json"  # the builder's, of an engine that it need not hash again
MAX_SIDECAR_BYTES = 64 << 20

# Flags of TensorRT engines.
REFIT, VERSION_COMPATIBLE = "refit", "version_compatible"

_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_PORTABLE_FROM_SM = 80  # TensorRT-RTX: an engine for no architecture in particular runs from Ampere on

Shape = tuple[int, ...]


class InputRange(Frozen, frozen=True, kw_only=True):
    """The shapes an engine takes for one input: the smallest, the one it is tuned for, the largest."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        same_rank = len(self.min) == len(self.opt) == len(self.max)
        if not same_rank or any(not 0 <= a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"min {self.min}, opt {self.opt}, max {self.max} are no rising sizes")

    def holds(self, shape: Shape) -> bool:
        """Whether a tensor of this shape may be given."""
        return len(shape) == len(self.max) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        sides = (f"{low}" if low == high else f"{low}..{high}" for low, high in zip(self.min, self.max, strict=True))
        return f"({', '.join(sides)})"


class Ingredients(Frozen, frozen=True, kw_only=True):
    """All that an engine depends on; its key is their digest.

    graph: sha256 of the ONNX file it was built from. weights: that of each file beside it that holds weights.
    origin: sha256 of the bundle's ONNX file of the component; `variant` says what was made of it.
    profiles: for each, the ranges of every input; none where the engine takes every shape.
    device: as in the target. architecture: system and processor that the engine runs on.
    precision: of the arithmetic: what the target asks for, else what the component was exported in.
    flags: what else the builder was told; OpenVINO wants it again when it imports a blob, which forgets its precision.
    recipe: which way of building of ours it was.
    """

    graph: str
    weights: dict[str, str]
    origin: str
    variant: Variant = PLAIN
    profiles: tuple[dict[str, InputRange], ...]
    backend: str
    backend_version: str
    device: str
    architecture: str
    precision: str
    flags: dict[str, str | int | bool]
    recipe: int

    @property
    def key(self) -> str:
        """The digest over everything, 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class Layer(Frozen, frozen=True, kw_only=True):
    """One layer of a compiled graph: its kind in the backend's words, the type it computes in, the nodes it fuses."""

    name: str
    kind: str
    precision: str = ""
    nodes: tuple[str, ...] = ()


class Engine(Frozen, frozen=True, kw_only=True):
    """What `engine.json` says of an engine.

    component: what it was called in the bundle it was built for. profile_names: as the profiles in `ingredients`.
    profile_memory_bytes: scratch memory of a call in each profile, where the builder tells.
    layers: those of the compiled graph, where the backend tells.
    multiply_adds: of a call as the first profile is tuned for, by block of the graph; none where they are not known.
    build_s: how long the build took; peak_memory_bytes: how much memory it took at most.
    """

    format: int
    component: str
    ingredients: Ingredients
    files: dict[str, FileRecord]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile_names: tuple[str, ...]
    profile_memory_bytes: tuple[int, ...] = ()
    layers: tuple[Layer, ...] = ()
    multiply_adds: dict[str, int] = msgspec.field(default_factory=dict)
    build_s: float
    peak_memory_bytes: int
    versions: dict[str, str]

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True, slots=True)
class Found:
    """An engine that fits: its folder and sidecar, which of its profiles serves the call best, and how wide that is."""

    folder: Path
    engine: Engine
    profile: int
    width: int

    @property
    def order(self) -> tuple[Any, ...]:
        """What orders engines that fit alike: narrowest profile, cheapest variant, one that cannot be refitted."""
        made_of = self.engine.ingredients
        return self.width, made_of.variant.cost, REFIT in made_of.flags, self.folder.name


class _FormatOnly(msgspec.Struct):
    format: int


def cache_folder(given: str | Path | None = None) -> Path:
    """The cache: `given`, else `$TANDEMRT_CACHE`, else `$XDG_CACHE_HOME/tandemrt`, else `~/.cache/tandemrt`."""
    if given is not None:
        return Path(given)
    own, general = os.environ.get("TANDEMRT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return Path(general) / "tandemrt" if general else Path.home() / ".cache" / "tandemrt"


def engines_folder(cache: Path) -> Path:
    """Where in a cache the engines lie."""
    return cache / "engines"


def origin_of(bundle: Bundle, name: str) -> str:
    """The sha256 of the ONNX file of component `name`, as the manifest lists it."""
    return bundle.manifest.files[bundle.component(name).model].sha256


def weights_of(bundle: Bundle, name: str) -> dict[str, str]:
    """The sha256 of every file that the graph of component `name` keeps weights in, by its name beside the graph."""
    model = bundle.component(name).model
    folder = posixpath.dirname(model)
    beside = ((location, posixpath.normpath(posixpath.join(folder, location)))
              for location in sorted(external_files(bundle.path / model)))  # fmt: skip
    return {location: bundle.manifest.files[path].sha256 for location, path in beside}


def architecture_of(target: Target) -> str:
    """What an engine for a target is bound to here: the processor where it runs on one, else the system alone."""
    return cpu_architecture() if target.device == "cpu" else system_architecture()


def read_sidecar(folder: Path) -> Engine:
    """What the sidecar in an engine's folder says.

    Raises:
        EngineError: there is none, it cannot be read, or it is of another format.
    """
    path, remedy = folder / SIDECAR_NAME, "Build the engine again."
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_SIDECAR_BYTES + 1)
        if len(raw) > MAX_SIDECAR_BYTES:
            raise EngineError(str(path), "size", expected=f"at most {MAX_SIDECAR_BYTES} bytes", remedy=remedy)
        stated = msgspec.json.decode(raw, type=_FormatOnly).format
        if stated != FORMAT:
            raise EngineError(str(path), "format of the engine", got=stated, expected=str(FORMAT), remedy=remedy)
        engine = msgspec.json.decode(raw, type=Engine)
    except OSError as error:
        raise EngineError(str(path), f"cannot be read ({error.strerror or error})", remedy=remedy) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(str(path), f"not an engine's sidecar ({error})", remedy=remedy) from error
    strange = next((name for name in engine.files if not _FILE.fullmatch(name)), None)
    if strange is not None or not engine.files:
        raise EngineError(
            str(path), "names of files", got=strange, expected="plain names of one file or more", remedy=remedy
        )
    # What is loaded must be among what is hashed.
    whole = GRAPH_NAME in engine.files if engine.ingredients.backend == "onnxruntime" else len(engine.files) == 1
    if not whole:
        expected = f"{GRAPH_NAME} of ONNX Runtime, one file of any other backend"
        raise EngineError(str(path), "files", got=sorted(engine.files), expected=expected, remedy=remedy)
    if engine.ingredients.key != folder.name:
        raise EngineError(str(path), "key", got=engine.ingredients.key, expected=folder.name, remedy=remedy)
    return engine


def check_engine_files(folder: Path, engine: Engine) -> None:
    """Prove that an engine's files are those that were built.

    Raises:
        EngineError: one is missing, no regular file, or has another size or content. What the builder knew of them is
            then forgotten, so that building the engine again helps.
    """
    try:
        _check_files(folder, engine)
    except EngineError:
        with suppress(OSError):
            (folder / PROOF_NAME).unlink()
        raise


def _check_files(folder: Path, engine: Engine) -> None:
    remedy = "Build the engine again."
    for name, record in engine.files.items():
        path = folder / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise EngineError(str(path), "not a regular file", remedy=remedy)
            if status.st_size != record.size:
                raise EngineError(str(path), "size", got=status.st_size, expected=f"{record.size} bytes", remedy=remedy)
            digest = file_sha256(path)
        except OSError as error:
            raise EngineError(str(path), f"cannot be read ({error.strerror or error})", remedy=remedy) from error
        if digest != record.sha256:
            raise EngineError(str(path), "sha256", got=digest, expected=record.sha256, remedy=remedy)


def cached_engines(cache: Path) -> Iterator[tuple[Path, Engine | EngineError]]:
    """Every engine of a cache with its sidecar, or with what is wrong with it; those being built are not seen.

    Raises:
        EngineError: the cache belongs to another user, or everybody may write to it.
    """
    folder = engines_folder(cache)
    if not os.path.lexists(folder):
        return
    _check_ownership(folder)
    for entry in sorted(folder.iterdir()):
        if _KEY.fullmatch(entry.name):
            try:
                yield entry, read_sidecar(entry)
            except EngineError as error:
                yield entry, error


def find_engine(
    bundle: Bundle,
    component: str,
    target: Target,
    shapes: Mapping[str, Shape] | None = None,
    *,
    cache: Path | None = None,
    variant: Variant = PLAIN,
) -> Found:
    """The engine in the cache that runs a component on a target, its files proved to be those that were built.

    Raises:
        EngineError: as `fitting_engine`, or the files are others.
        TargetError: the target's backend is not installed.
    """
    found = fitting_engine(bundle, component, target, shapes, cache=cache, variant=variant)
    check_engine_files(found.folder, found.engine)
    return found


def fitting_engine(
    bundle: Bundle,
    component: str,
    target: Target,
    shapes: Mapping[str, Shape] | None = None,
    *,
    cache: Path | None = None,
    variant: Variant = PLAIN,
) -> Found:
    """The engine in the cache that runs a component on a target, by what its sidecar says.

    target: for TensorRT with the one architecture that is here, such as `tensorrt-rtx:sm89`.
    shapes: of the call's inputs; None for an engine of any profile. Of several that fit, the one whose profile is the
        narrowest is taken, of these the one whose variant costs least.
    cache: as in `cache_folder`. variant: what the engine must be, or more; see `Variant.serves`.

    Raises:
        EngineError: there is none, or none that fits, with the reason and the command that builds one.
        TargetError: the target's backend is not installed.
    """
    misfits: list[str] = []
    fitting: list[Found] = []
    for folder, engine, reason in engines_of(bundle, component, target, cache=cache):
        made_as = engine.ingredients.variant
        if not made_as.serves(variant):
            if variant.lora_slots and made_as.serves(msgspec.structs.replace(variant, lora_slots=1, lora_rank=1)):
                misfits.append(f"{folder.name[:12]} has {made_as}, which are too few or too small")
            continue
        found = None if reason else fitted(folder, engine, shapes)
        if found is None:
            misfits.append(f"{folder.name[:12]} {reason or _out_of_profile(engine.ingredients, shapes or {})}")
        else:
            fitting.append(found)
    if not fitting:
        target = target.of_component(bundle.component(component))
        command = build_command(bundle, component, target, variant, shapes, cache)
        remedy = f"Run `{command}`."
        wanted = f"engine for {target}{'' if variant == PLAIN else f' ({variant})'}"
        why = f"no {wanted} fits: {'; '.join(misfits)}" if misfits else f"there is no {wanted}"
        raise EngineError(component, f"{why} (in {engines_folder(cache_folder(cache))})", remedy=remedy)
    return min(fitting, key=lambda found: found.order)


def engines_of(
    bundle: Bundle, component: str, target: Target, *, cache: Path | None = None
) -> Iterator[tuple[Path, Engine, str | None]]:
    """Every engine in the cache that was built from a component for a target's backend, in any variant.

    With each comes why it does not run here, in words that follow its name; None where it does. target, cache: as of
    `fitting_engine`.

    Raises:
        EngineError: as of `cached_engines`.
        TargetError: the target's backend is not installed.
    """
    target = target.of_component(bundle.component(component))
    origin, weights = origin_of(bundle, component), weights_of(bundle, component)
    for folder, engine in cached_engines(cache_folder(cache)):
        if isinstance(engine, Engine):
            made_of = engine.ingredients
            if (made_of.origin, made_of.backend) == (origin, target.backend):
                yield folder, engine, _misfit(made_of, weights, target)


def fitted(folder: Path, engine: Engine, shapes: Mapping[str, Shape] | None) -> Found | None:
    """An engine with the narrowest of its profiles that takes these shapes; None where none does."""
    served = _serving(engine.ingredients, shapes)
    return None if served is None else Found(folder, engine, served[1], served[0])


def profile_for(engine: Engine, shapes: Mapping[str, Shape]) -> int | None:
    """The narrowest profile of an engine that takes these shapes, by its place; None where none does."""
    served = _serving(engine.ingredients, shapes)
    return None if served is None else served[1]


def has_engine(
    bundle: Bundle, component: str, target: Target, *, cache: Path | None = None, variant: Variant = PLAIN
) -> bool:
    """Whether anything in the cache was built from a component, in this variant, for a target's backend and device.

    Raises:
        EngineError: as of `cached_engines`.
    """
    wanted = origin_of(bundle, component), target.backend, target.device
    sidecars = (engine for _, engine in cached_engines(cache_folder(cache)) if isinstance(engine, Engine))
    return any(
        (one.origin, one.backend, one.device) == wanted and one.variant.serves(variant)
        for one in (engine.ingredients for engine in sidecars)
    )


def _misfit(made_of: Ingredients, weights: Mapping[str, str], target: Target) -> str | None:
    """Why an engine does not run here, in words that follow its name; None where it does."""
    version = installed_version(target.backend)
    differing: tuple[tuple[bool, str], ...] = (
        (made_of.weights != weights, "was built from other weights"),
        (not _covers(made_of.device, target.device), f"is for {made_of.device}, not {target.device}"),
        (made_of.precision != target.precision, f"computes in {made_of.precision}, not {target.precision}"),
        (
            not _runs_on_version(made_of, version),
            f"is of {made_of.backend} {made_of.backend_version}, here is {version}",
        ),
        (made_of.architecture != architecture_of(target), f"is for {made_of.architecture}"),
    )
    return next((reason for differs, reason in differing if differs), None)


def _runs_on_version(made_of: Ingredients, version: str) -> bool:
    """Whether an engine runs on a backend's version: its own, or a newer one of the same major if it was built so."""
    if made_of.backend_version == version or VERSION_COMPATIBLE not in made_of.flags:
        return made_of.backend_version == version
    own, here = ([int(part) for part in re.findall(r"\d+", text)] for text in (made_of.backend_version, version))
    return own[:1] == here[:1] and own <= here


def _covers(built_for: str, device: str) -> bool:
    if built_for == PORTABLE and device.startswith("sm"):
        return all(int(sm[2:]) >= _PORTABLE_FROM_SM for sm in device.split("+"))
    return set(device.split("+")) <= set(built_for.split("+"))


def _serving(made_of: Ingredients, shapes: Mapping[str, Shape] | None) -> tuple[int, int] | None:
    """How wide the narrowest profile is that takes these shapes, and which it is; None where none does."""
    if not made_of.profiles or shapes is None:
        return 0, 0
    fitting = [
        (sum(prod(one.max) - prod(one.min) for one in ranges.values()), index)
        for index, ranges in enumerate(made_of.profiles)
        if ranges.keys() == shapes.keys() and all(ranges[name].holds(shape) for name, shape in shapes.items())
    ]
    return min(fitting, default=None)


def _out_of_profile(made_of: Ingredients, shapes: Mapping[str, Shape]) -> str:
    misfits = (
        f"{name} {shape} is outside {ranges[name]}" if name in ranges else f"{name} is not among its inputs"
        for ranges in made_of.profiles
        for name, shape in shapes.items()
        if name not in ranges or not ranges[name].holds(shape)
    )
    return f"has no profile for this call: {next(misfits, 'it lacks inputs')}"


def _check_ownership(folder: Path) -> None:
    """Engines are native code: a folder that others could have put them into is not read."""
    try:
        status = folder.stat()
    except OSError as error:
        raise EngineError(
            str(folder), f"cannot be read ({error.strerror or error})", remedy="Check the path."
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise EngineError(str(folder), "not a folder", remedy="Give another cache.")
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        what = "belongs to another user, and engines are code that would run as you"
        remedy = "Give a cache of your own, in $TANDEMRT_CACHE or with --cache where a command takes it."
        raise EngineError(str(folder), what, remedy=remedy)
    if status.st_mode & stat.S_IWOTH:
        what = "can be written by everybody, and engines are code that would run as you"
        raise EngineError(str(folder), what, remedy=f"Check what is in it, then `chmod o-w {folder}`.")
