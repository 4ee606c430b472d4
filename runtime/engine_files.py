"""Engines in the user's cache, and what the sidecar `engine.json` beside each says.

    <cache>/engines/<key>/engine.json    with the engine's files beside it
    <cache>/engines/<key>/layers.json    what it is compiled to, which is most of what there is to say, and not run by

An engine is native code that a backend runs as it is: engines are read from the user's own cache alone, never from a
bundle, and a digest in the sidecar proves that a file is the one that was built, not who built it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from .architecture import cpu_architecture, system_architecture
from .bundle import Bundle
from .cache import check_ownership, engines_folder
from .errors import BUILD, EngineError
from .files import file_sha256
from .manifest import FileRecord, Frozen, TensorSpec
from .onnx_files import external_files
from .targets import Target
from .variant import PLAIN, Variant

FORMAT = 2
SIDECAR_NAME = "engine.json"
LAYERS_NAME = "layers.json"
GRAPH_NAME = "model.onnx"  # any graph's file, and what an engine of ONNX Runtime consists of; weights beside it
PROOF_NAME = "proof.json"  # the builder's, of an engine that it need not hash again
MAX_SIDECAR_BYTES = 64 << 20

BUILD_AGAIN = f"Build the engine again with {BUILD}."  # where the builder finds the damage too

# Of what is built now: to be raised when engines come to be built in another way from the same ingredients.
RECIPES = {"tensorrt-rtx": 2, "tensorrt": 2, "openvino": 3, "onnxruntime": 3}

# Flags of TensorRT engines.
REFIT, VERSION_COMPATIBLE = "refit", "version_compatible"

_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

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
    recipe: which way of building of ours it was; see `RECIPES`.
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
    def refittable(self) -> bool:
        """Whether LoRAs can be put into its weights: built to be refitted, of a graph that has all of the bundle's."""
        whole = not (self.variant.lora_slots or self.variant.timesteps or self.variant.stage)
        return bool(self.flags.get(REFIT)) and whole

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
    layer_count: how many layers the compiled graph has, 0 where the backend does not tell; see `read_layers`.
    multiply_adds: of a call as the first profile is tuned for, by block of the graph; none where they are not known,
        and then multiply_adds_error says why.
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
    layer_count: int = 0
    multiply_adds: dict[str, int] = msgspec.field(default_factory=dict)
    multiply_adds_error: str = ""
    build_s: float
    peak_memory_bytes: int
    versions: dict[str, str]

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(record.size for record in self.files.values())


class _FormatOnly(msgspec.Struct):
    format: int


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
    """What an engine for a target is bound to here: the system, and the processor or GPU that the target leaves open.

    Raises:
        TargetError: the target's device is not here.
    """
    if target.device == "cpu":
        return cpu_architecture()
    if target.backend == "openvino":
        from .backends.openvino import device_name  # noqa: PLC0415 (a backend loads when it is used)

        return f"{system_architecture()} {device_name(target.device)}"
    return system_architecture()


def read_sidecar(folder: Path) -> Engine:
    """What the sidecar in an engine's folder says.

    Raises:
        EngineError: there is none, it cannot be read, or it is of another format.
    """
    path, remedy = folder / SIDECAR_NAME, BUILD_AGAIN
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


def read_layers(folder: Path) -> tuple[Layer, ...]:
    """The layers of the compiled graph; none where the backend does not tell.

    Raises:
        EngineError: the file cannot be read, or is something else.
    """
    path = folder / LAYERS_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Layer, ...])
    except OSError as error:
        raise EngineError(str(path), f"cannot be read ({error.strerror or error})") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(str(path), f"not an engine's layers ({error})") from error


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
    remedy = BUILD_AGAIN
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
        EngineError: the cache belongs to another user, or others may write to it.
    """
    folder = engines_folder(cache)
    if not os.path.lexists(folder):
        return
    check_ownership(folder)
    for entry in sorted(folder.iterdir()):
        if _KEY.fullmatch(entry.name):
            try:
                check_ownership(entry)
                yield entry, read_sidecar(entry)
            except EngineError as error:
                yield entry, error
