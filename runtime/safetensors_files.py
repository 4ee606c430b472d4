"""Safetensors files: their headers, checked before a byte of weights is read, their tensors one by one; and writing.

The format: https://huggingface.co/docs/safetensors. Files are untrusted: every size and offset is checked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError

# 300,000 entries make a 19 MB header that takes seconds and 600 MB to parse; SDXL's has 1,680 entries in 0.2 MB.
MAX_HEADER_BYTES = 8 << 20
MAX_JSON_BYTES = 16 << 20
_MAX_VALUES = 1 << 48
_NAMED = 5
# Of each dtype by safetensors' name: numpy's, and for bfloat16, which numpy has not, that of its bits.
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
AGAIN = "Download the file again."
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Place:
    """Where in a file a tensor lies, in bytes, and in which of safetensors' dtypes."""

    dtype: str
    offset: int
    size: int


@dataclass(frozen=True)
class SafetensorsFile:
    """One safetensors file, its header read and checked.

    metadata: what the header's `__metadata__` holds, by key; not checked.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor.

        They are read, not mapped: pages of a mapped file count as this process's memory for as long as it is open.

        Raises:
            CheckpointError: the file cannot be read, or was cut since its header was read.
        """
        place = self.places[name]
        raw = np.empty(place.size, np.uint8)
        try:
            with self.path.open("rb") as stream:
                stream.seek(place.offset)
                read = stream.readinto(raw.data)
        except OSError as error:
            raise CheckpointError(str(self.path), f"cannot be read ({error.strerror})", remedy=AGAIN) from error
        if read != place.size:
            raise CheckpointError(
                f"{self.path}: {name}", "truncated", got=read, expected=f"{place.size} bytes", remedy=AGAIN
            )
        return raw

    def array(self, name: str) -> npt.NDArray[Any]:
        """One tensor in the dtype it is stored in, bfloat16 as float32; raises as `raw`."""
        dtype = self.places[name].dtype
        values = self.raw(name).view(DTYPES[dtype])
        if dtype == "BF16":
            # The upper half of a float32's bits.
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(self.shapes[name])


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
        raise CheckpointError(str(path), f"not JSON ({error})", remedy=AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "content", got=type(value).__name__, expected="a JSON object", remedy=AGAIN)
    return value


@dataclass(frozen=True)
class Header:
    """What a header says: of each tensor its shape and its place; and `__metadata__`, by key, not checked."""

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    metadata: Mapping[str, Any]


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
            raw = stream.read(_header_length(str(path), prefix, MAX_HEADER_BYTES))
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", remedy="Check the path.") from error
    header = described(str(path), prefix + raw, size=size)
    return SafetensorsFile(path, header.shapes, header.places, header.metadata)


def described(where: str, start: bytes, most: int = MAX_HEADER_BYTES, size: int | None = None) -> Header:
    """The header of a file, or of a message, which begins with these bytes.

    most: how long the header may be. size: of all of it, where `start` is but its beginning.

    Raises:
        CheckpointError: truncated, or a header that is oversized or does not describe all of it.
    """
    size = len(start) if size is None else size
    length = _header_length(where, start[:8], most)
    raw = start[8 : 8 + length]
    if len(raw) < length:
        raise CheckpointError(where, "truncated", got=size, expected=f"at least {8 + length} bytes", remedy=AGAIN)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        metadata = dict(header.get("__metadata__") or {})
        shapes = {name: _shape(entry["shape"]) for name, entry in entries.items()}
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        wanted = {
            name: _item_bytes(f"{where}: {name}", entry["dtype"]) * prod(shapes[name])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"not a safetensors header ({type(error).__name__}: {error})"
        raise CheckpointError(where, what, remedy=AGAIN) from error
    end = _require_spans(where, spans, wanted)
    expected = 8 + length + end
    if size != expected:
        what = "truncated" if size < expected else "size"
        raise CheckpointError(where, what, got=size, expected=f"{expected} bytes", remedy=AGAIN)
    places = {name: Place(entries[name]["dtype"], 8 + length + span[0], wanted[name]) for name, span in spans.items()}
    return Header(shapes, places, metadata)


def _header_length(where: str, prefix: bytes, most: int) -> int:
    length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= most:
        expected = f"2..{most} bytes"
        raise CheckpointError(where, "safetensors header size", got=length, expected=expected, remedy=AGAIN)
    return length


def _require_spans(where: str, spans: Mapping[str, tuple[int, ...]], wanted: Mapping[str, int]) -> int:
    """Check where tensors lie behind the header, against their sizes; returns where the last one ends."""
    for name, span in spans.items():
        if len(span) != 2 or span[1] - span[0] != wanted[name] or span[0] < 0:
            raise CheckpointError(
                f"{where}: {name}", "data_offsets", got=span, expected=f"a span of {wanted[name]} bytes", remedy=AGAIN
            )
    end = 0
    # As the format has it, tensors lie one behind the other: what overlaps or leaves gaps may hold anything.
    for name, span in sorted(spans.items(), key=lambda one: one[1]):
        if span[0] != end:
            behind = f"{end}, where the tensor before it ends"
            raise CheckpointError(f"{where}: {name}", "data_offsets", got=span[0], expected=behind, remedy=AGAIN)
        end = span[1]
    return end


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write tensors in their order, the first at a multiple of 8 bytes; of any of the dtypes but bfloat16."""
    dtypes = {np.dtype(kind): name for name, kind in DTYPES.items() if name != "BF16"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": dtypes[values.dtype], "shape": list(values.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    stream.write(struct.pack("<Q", len(raw)) + raw)
    for values in tensors.values():
        stream.write(np.ascontiguousarray(values).data)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that is there twice, readers would take different ones."""
    listed = dict(pairs)
    if len(listed) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in listed if names.count(name) > 1)!r} twice")
    return listed


def _shape(lengths: Iterable[Any]) -> tuple[int, ...]:
    shape = tuple(map(int, lengths))
    # An empty tensor may have lengths that no array could have.
    if min(shape, default=0) < 0 or prod(max(length, 1) for length in shape) >= _MAX_VALUES:
        raise ValueError(f"shape {shape}")
    return shape


def _item_bytes(where: str, dtype: str) -> int:
    if dtype not in DTYPES:
        raise CheckpointError(
            where,
            "dtype that is not supported",
            got=dtype,
            expected=f"one of {', '.join(DTYPES)}",
            remedy="Save the model again in one of them.",
        )
    return np.dtype(DTYPES[dtype]).itemsize
