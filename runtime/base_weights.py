"""What an engine that is refitted is given: the bundle's weights by name, and what LoRAs add to them.

TensorRT knows weights by the names of ONNX's initializers, and what is composed around a graph leaves them theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

from .backends.base import Array
from .errors import BundleError, RequestError
from .lora_slots import Adapter, Float32, LowRank, float32_scale
from .onnx_files import own_projections, stored_weights
from .onnx_walk import Projection


class BaseWeights(Mapping[str, Array]):
    """The weights of a graph by name, mapped into memory from files that stay open; read-only arrays."""

    def __init__(self, model: Path) -> None:
        """model: an ONNX file whose weights lie in files of its folder, all of them proved by the caller.

        Raises:
            BundleError: it cannot be read, or projections share names or weights, so that LoRAs would change both.
        """
        self.projections = own_projections(model)
        self._stored = stored_weights(model)
        self._model = model
        try:
            files = {one.file: model.parent / one.file if one.file else model for one in self._stored.values()}
            self._files = {name: np.memmap(path, np.uint8, "r") for name, path in files.items()}
        except (OSError, ValueError) as error:
            raise BundleError(str(model), f"its weights cannot be read ({error})", remedy="Export it again.") from error

    def __getitem__(self, name: str) -> Array:
        one = self._stored[name]
        count, data = prod(one.shape), self._files[one.file]
        try:
            values = np.frombuffer(data, one.dtype, count, one.offset) if count else np.zeros(0, one.dtype)
        except (ValueError, TypeError) as error:
            what = f"weight {name!r} cannot be read ({error})"
            raise BundleError(str(self._model), what, remedy="Export the bundle again.") from error
        return np.require(values.reshape(one.shape), requirements=["C", "ALIGNED"])

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class Changes(Mapping[str, Array]):
    """What adapters, mixed, add to weights by name: float32, as the weights are stored, made when it is asked for."""

    def __init__(self, base: BaseWeights, adapters: Sequence[Adapter]) -> None:
        """Nothing is multiplied yet.

        Raises:
            RequestError: a module that the graph has not, a weight of another shape, or a scale that is not finite.
        """
        self._parts: dict[str, list[tuple[Projection, float, LowRank]]] = {}
        for adapter in adapters:
            scale = float32_scale(adapter)
            for module, change in adapter.changes.items():
                one = base.projections.get(module)
                if one is None:
                    raise RequestError("loras", f"{adapter.name}: no such projection", got=module)
                got = len(change.up), change.down.shape[1]
                if got != (one.shape[0], prod(one.shape[1:])):
                    expected = f"that of {one.shape}"
                    raise RequestError("loras", f"{adapter.name}: shape of {module}", got=got, expected=expected)
                self._parts.setdefault(one.weight, []).append((one, scale, change))

    def __getitem__(self, name: str) -> Array:
        (one, *_), *_ = parts = self._parts[name]
        added: Float32 = np.zeros(one.shape, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is added
            for _, scale, change in parts:
                added += np.float32(scale) * (change.up @ change.down).reshape(one.shape)
        return added.T if one.turned else added

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
