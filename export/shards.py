"""Weights spread over several files: the index that names them is held to what the files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import CheckpointError
from ..runtime.safetensors_files import listed, read_json
from .weights import Weights

if TYPE_CHECKING:
    import torch

_AGAIN = "Download the checkpoint again."


@dataclass(frozen=True)
class Shards:
    """Several files of weights and their index; see `Weights`."""

    index: Path
    shards: Mapping[str, Weights]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.index, *sorted({path for shard in self.shards.values() for path in shard.files})

    def load(self, name: str) -> torch.Tensor:
        """One tensor in the dtype it is stored in; see `Weights.load`."""
        return self.shards[name].load(name)


def read_shards(index: Path, read: Callable[[Path], Weights]) -> Shards:
    """Read the index that save_pretrained writes (`{"weight_map": {tensor: file}}`) and, by `read`, the files it names.

    Raises:
        CheckpointError: the index is damaged, names a file outside its folder or one that is not there, or tells
            another tale than the files; what `read` raises for one of them.
    """
    weight_map = _weight_map(index)
    shards = {name: _read_shard(index.parent / name, read) for name in sorted(set(weight_map.values()))}
    for name, shard in shards.items():
        stated = {tensor for tensor, file in weight_map.items() if file == name}
        for what, tensors in (
            (f"tensors that {index.name} states and the file does not hold", stated - shard.shapes.keys()),
            (f"tensors that {index.name} does not state for it", shard.shapes.keys() - stated),
        ):
            if tensors:
                raise CheckpointError(str(index.parent / name), f"{what}: {listed(tensors)}", remedy=_AGAIN)
    return Shards(
        index,
        {tensor: shards[name] for tensor, name in weight_map.items()},
        {tensor: shards[name].shapes[tensor] for tensor, name in weight_map.items()},
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map", "content", got=weight_map, expected="an object of tensors and files", remedy=_AGAIN
        )
    for name in weight_map.values():
        # A shard may be a link to elsewhere, as in the hub's cache; its name may not lead there.
        if not isinstance(name, str) or not name.isprintable() or {"/", "\\"} & set(name) or name in {"", ".", ".."}:
            expected = f"the name of a file in {index.parent}"
            raise CheckpointError(f"{index}: weight_map", "shard", got=name, expected=expected)
    return weight_map


def _read_shard(path: Path, read: Callable[[Path], Weights]) -> Weights:
    if not path.is_file():
        raise CheckpointError(str(path), "a shard that is missing", remedy=_AGAIN)
    return read(path)
