"""Safetensors files: their headers, checked before a byte of weights is read, and their tensors one by one."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..runtime.errors import CheckpointError
from ..runtime.manifest import file_sha256

if TYPE_CHECKING:
    import torch

# 300,000 entries make a 19 MB header that takes seconds and 600 MB to parse; SDXL's has 1,680 entries in 0.2 MB.
MAX_HEADER_BYTES = 8 << 20
MAX_JSON_BYTES = 16 << 20
_NAMED = 5
# Of each dtype by safetensors' name: torch's name, and the bytes of one number.
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
_AGAIN = "Download the file again."
_LFS_POINTER = b"version https://git-lfs"


class Weights(Protocol):
    """A model's tensors by name: their shapes are known, none of them is read yet.

    `files` is what they are read from, for digests and messages; the first is named in errors.
    """

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in.

        Raises:
            CheckpointError: the file is damaged.
        """


@dataclass(frozen=True)
class Place:
    """Where in a file a tensor lies, in bytes, and in which of safetensors' dtypes."""

    dtype: str
    offset: int
    size: int


@dataclass(frozen=True)
class SafetensorsFile:
    """One safetensors file, its header read and checked; see `Weights`.

    metadata: what the header's `__metadata__` holds, by key; not checked.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in; see `Weights.load`.

        It is read, not mapped: pages of a mapped file count as this process's memory for as long as it is open.
        """
        import torch  # noqa: PLC0415 — reading headers, as --print-plan does, must not need torch

        place = self.places[name]
        raw = torch.empty(place.size, dtype=torch.uint8)
        try:
            with self.path.open("rb") as stream:
                stream.seek(place.offset)
                read = stream.readinto(raw.numpy())
        except OSError as error:
            raise CheckpointError(str(self.path), f"cannot be read ({error.strerror})", remedy=_AGAIN) from error
        if read != place.size:
            raise CheckpointError(
                f"{self.path}: {name}", "truncated", got=read, expected=f"{place.size} bytes", remedy=_AGAIN
            )
        return raw.view(getattr(torch, DTYPES[place.dtype][0])).reshape(self.shapes[name])


def parameters(weights: Weights) -> int:
    """How many numbers the weights are."""
    return sum(_size(shape) for shape in weights.shapes.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MiB.

    Raises:
        CheckpointError: missing, unreadable, too large, not JSON, not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                str(path), "size", got=path.stat().st_size, expected=f"at most {MAX_JSON_BYTES} bytes"
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", remedy="Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"not JSON ({error})", remedy=_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "content", got=type(value).__name__, expected="a JSON object", remedy=_AGAIN)
    return value


def read_header(path: Path) -> SafetensorsFile:
    """Read a safetensors header: 8 bytes of length, then JSON.

    Raises:
        CheckpointError: unreadable, truncated, or a header that is oversized or does not describe the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if prefix + stream.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
                raise CheckpointError(
                    str(path), "a Git LFS pointer, not the file itself", remedy="Run `git lfs pull` in its repository."
                )
            stream.seek(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise CheckpointError(
                    str(path),
                    "safetensors header size",
                    got=length,
                    expected=f"2..{MAX_HEADER_BYTES} bytes",
                    remedy=_AGAIN,
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", remedy="Check the path.") from error
    if len(raw) < length:
        raise CheckpointError(str(path), "truncated", got=size, expected=f"at least {8 + length} bytes", remedy=_AGAIN)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        metadata = dict(header.get("__metadata__") or {})
        shapes = {name: tuple(int(length) for length in entry["shape"]) for name, entry in entries.items()}
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        wanted = {
            name: _item_bytes(f"{path}: {name}", entry["dtype"]) * _size(shapes[name])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(str(path), f"not a safetensors header ({error!r})", remedy=_AGAIN) from error
    for name, span in spans.items():
        if len(span) != 2 or span[1] - span[0] != wanted[name] or span[0] < 0:
            raise CheckpointError(
                f"{path}: {name}", "data_offsets", got=span, expected=f"a span of {wanted[name]} bytes", remedy=_AGAIN
            )
    expected = 8 + length + max((span[1] for span in spans.values()), default=0)
    if size != expected:
        what = "truncated" if size < expected else "size"
        raise CheckpointError(str(path), what, got=size, expected=f"{expected} bytes", remedy=_AGAIN)
    places = {name: Place(entries[name]["dtype"], 8 + length + span[0], wanted[name]) for name, span in spans.items()}
    return SafetensorsFile(path, shapes, places, metadata)


def copy_source(source: Path, target: Path) -> None:
    """Copy a small file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
        OSError: the copy cannot be written.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CheckpointError(str(source), f"cannot be read ({error.strerror})", remedy="Check the file.") from error
    target.write_bytes(content)


def source_digest(paths: Iterable[Path], facts: str = "", known: dict[Path, str] | None = None) -> str:
    """The sha256 over the names and sha256 of files, in the order of their names, and over `Part.facts`.

    known: the sha256 of files that need not be read again, to which those of the others are added.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest, known = hashlib.sha256(), {} if known is None else known
    try:
        for path in sorted(paths, key=lambda each: each.name):
            known[path] = known.get(path) or file_sha256(path)
            digest.update(f"{path.name}\0{known[path]}\0".encode())
        if facts:
            # No file has an empty name.
            digest.update(f"\0{facts}".encode())
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise CheckpointError(str(error.filename), what, remedy="Check the file.") from error
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _item_bytes(where: str, dtype: str) -> int:
    if dtype not in DTYPES:
        raise CheckpointError(
            where,
            "dtype that is not supported",
            got=dtype,
            expected=f"one of {', '.join(DTYPES)}",
            remedy="Save the model again in one of them.",
        )
    return DTYPES[dtype][1]


def _size(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
