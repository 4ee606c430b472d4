"""LoRAs fused into the weights that they were trained beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..runtime import lora_files
from ..runtime.errors import CheckpointError
from ..runtime.lora_files import OTHER_BASE, PEFT_STEM, Lora, Tensors, Update
from ..runtime.lora_names import PartName, spellings
from ..runtime.safetensors_files import listed
from .weight_files import find_weights, read_weights
from .weights import SafetensorsFile, Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FusedWeights:
    """Weights with LoRAs fused in, each when its tensor is read; see `Weights`.

    loras: those that change a tensor, and their scales. updates: theirs, for each tensor that changes.
    """

    base: Weights
    loras: tuple[tuple[Lora, float], ...]
    updates: Mapping[str, tuple[tuple[Lora, Update, float], ...]]

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, *(path for lora, _ in self.loras for path in lora.files))

    @property
    def facts(self) -> str:
        """What the weights depend on besides the files: which LoRA counts how many times."""
        return "".join(f"{lora.files[0].name} {scale!r}\n" for lora, scale in self.loras)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    def load(self, name: str) -> torch.Tensor:
        """One tensor: float32 where a LoRA changes it, else in the dtype it is stored in; see `Weights.load`."""
        import torch  # noqa: PLC0415 — reading headers, as --print-plan does, must not need torch

        tensor = self.base.load(name)
        for lora, update, scale in self.updates.get(name, ()):
            factors = lora.factors(update)
            change = torch.from_numpy(factors.up) @ torch.from_numpy(factors.down)
            tensor = tensor.float() + (scale * change).reshape(tensor.shape)
        return tensor


@dataclass(frozen=True)
class _AsArrays:
    """Weights that torch opened, as a LoRA is read from; see `Tensors`."""

    weights: Weights
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        return self.weights.files

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.weights.shapes

    def array(self, name: str) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self.weights.load(name).float().numpy()
        return values


def read_lora(path: Path, *, allow_pickle: bool = False) -> Lora:
    """Read the header of a LoRA, as `lora_files.read_lora`, or a pickled one.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: no LoRA, one of a kind that cannot be fused, pickled, or damaged.
    """

    def opened(path: Path) -> Tensors:
        find = find_weights(path, PEFT_STEM, allow_pickle=allow_pickle) if path.is_dir() else None
        weights = find or read_weights(path, allow_pickle=allow_pickle)
        return weights if isinstance(weights, SafetensorsFile) else _AsArrays(weights)

    return lora_files.read_lora(path, opened)


def fuse(weights: Weights, loras: Sequence[tuple[Lora, float]], part: PartName) -> FusedWeights:
    """The weights of `part` with each LoRA's updates added, times its scale; those of other parts are left out.

    Raises:
        CheckpointError: an update is of another shape than its weight, or a LoRA updates a weight twice.
    """
    shapes = _modules(weights)
    found: dict[str, tuple[tuple[Lora, Update, float], ...]] = {}
    used = []
    for lora, scale in loras:
        matched = lora.matched(shapes, part)
        for module, update in matched.items():
            name = f"{module}.weight"
            found[name] = (*found.get(name, ()), (lora, update, scale))
        used += [(lora, scale)] if matched else []
    return FusedWeights(weights, tuple(used), found)


def require_used(lora: Lora, parts: Mapping[PartName, Weights]) -> None:
    """Check that every update of a LoRA is of a weight in one of `parts`.

    Raises:
        CheckpointError: it is a LoRA for another base model; the first update without a weight is named.
    """
    known = {name for part, weights in parts.items() for name in spellings(_modules(weights), part)}
    left = [update for update in lora.updates if update.module not in known]
    if left:
        raise CheckpointError(
            f"{lora.files[0]}: {left[0].down}",
            f"a LoRA for another base model: {len(left)} of {len(lora.updates)} updates have no weight to change",
            got=f"an update of shape {left[0].shape}",
            expected=f"modules of {listed(parts)}",
            remedy=OTHER_BASE,
        )


def _modules(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shapes of all modules' weights, by module."""
    return {name.removesuffix(".weight"): shape for name, shape in weights.shapes.items() if name.endswith(".weight")}
