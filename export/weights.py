"""A model's tensors: known by name and shape, read one by one, and what their files' digests are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..runtime import safetensors_files
from ..runtime.errors import CheckpointError
from ..runtime.files import file_sha256

if TYPE_CHECKING:
    import torch

# Of each dtype by safetensors' name: torch's name.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


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


class SafetensorsFile(safetensors_files.SafetensorsFile):
    """One safetensors file, whose tensors become torch's; see `Weights`."""

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in; see `Weights.load`."""
        import torch  # noqa: PLC0415 — reading headers, as --print-plan does, must not need torch

        stored = self.places[name].dtype
        numbers = torch.from_numpy(self.raw(name).view(safetensors_files.DTYPES[stored]))
        dtype: torch.dtype = getattr(torch, DTYPES[stored])
        return numbers.view(dtype).reshape(self.shapes[name])


def parameters(weights: Weights) -> int:
    """How many numbers the weights are."""
    return sum(map(prod, weights.shapes.values()))


def read_header(path: Path) -> SafetensorsFile:
    """Read a safetensors header; raises as `safetensors_files.read_header`."""
    found = safetensors_files.read_header(path)
    return SafetensorsFile(found.path, found.shapes, found.places, found.metadata)


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
