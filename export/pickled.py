"""Weights that torch pickled, for those who ask for it: unpickled by torch's restricted unpickler alone."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CheckpointError
from .weights import DTYPES, first_line

if TYPE_CHECKING:
    import torch

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
WARNING = "--allow-pickle: unpickling can run code that a file brings along; give it files of people you trust alone"
_UNSAFE = re.compile(r"unsupported (?:global|class|operand)[^\n]*?(?= was not an allowed|\.?\n|$)", re.IGNORECASE)
_DTYPES = tuple(DTYPES.values())


@dataclass(frozen=True)
class PickledFile:
    """One pickled state dict, mapped from the file where its format lets it; see `Weights`."""

    path: Path
    tensors: Mapping[str, torch.Tensor]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in; see `Weights.load`."""
        return self.tensors[name]


def refused(path: Path, expected: str) -> CheckpointError:
    """The error for pickled weights that nobody asked for."""
    return CheckpointError(
        str(path),
        "pickled weights are refused, because unpickling runs code",
        expected=expected,
        remedy="Convert them where you trust them (load the model and save it with save_pretrained), or give "
        "--allow-pickle.",
    )


def read_pickled(path: Path) -> PickledFile:
    """A pickled state dict, by torch's `weights_only` unpickler, which builds tensors and plain containers alone.

    Raises:
        CheckpointError: the file is damaged, holds anything but tensors by name, or asks for more than that unpickler
            allows.
    """
    import torch  # noqa: PLC0415 — nothing else of reading a checkpoint's facts needs it

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        unsafe = _UNSAFE.search(str(error))
        what = unsafe[0] if unsafe else first_line(error)
        raise CheckpointError(
            str(path),
            f"torch's restricted unpickler refuses it ({what})",
            expected="a state dict of tensors",
            remedy="Use the model's safetensors file.",
        ) from error
    except Exception as error:  # a damaged archive raises RuntimeError, EOFError, KeyError and others
        raise CheckpointError(
            str(path), f"not readable as a pickled state dict ({first_line(error)})", remedy="Download the file again."
        ) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(str(path), "content", got=type(content).__name__, expected="a state dict of tensors")
    for name, value in content.items():
        _require_tensor(path, name, value)
    return PickledFile(path, content)


def _require_tensor(path: Path, name: object, value: Any) -> None:
    """Refuse what a safetensors file could not hold, among it tensors larger than what they are stored in."""
    import torch  # noqa: PLC0415

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path}: {name!r}", "entry", got=type(value).__name__, expected="a tensor under a name")
    dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name}", "tensor that is not supported", expected="a dense one, stored whole")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        what, expected = "dtype that is not supported", f"one of {', '.join(_DTYPES)}"
        raise CheckpointError(f"{path}: {name}", what, got=dtype, expected=expected)
