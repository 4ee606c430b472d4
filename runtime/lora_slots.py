"""LoRAs as inputs: what a graph with slots for them takes, and low-rank changes of weights laid out for it.

A module that has slots adds (x · down) · scale · up to what it makes of x. With S slots of rank R, each column of
`down` and row of `up` belongs to one slot; slots without a LoRA hold zeros and change nothing.

lora_scale: (S·R,) float32.
lora_down/MODULE: (in, S·R), of a convolution that looks at more than one place (S·R, in, height, width);
lora_up/MODULE: (S·R, out), both in the precision the graph has there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from .arguments import did_you_mean, finite_number
from .backends.base import Array
from .errors import RequestError
from .manifest import TensorSpec
from .tensors import spec_of

LORA_SCALE = "lora_scale"
LORA_DOWN = "lora_down/"
LORA_UP = "lora_up/"

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one module's weight, up · down, with what its file scales it by already in `up`.

    down: (r, in) float32, a convolution's (r, in · height · width). up: (out, r) float32.
    """

    down: Float32
    up: Float32


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA for one component: changes by module, and how strongly it is wanted; at 0 it changes no bit."""

    name: str
    changes: Mapping[str, LowRank]
    scale: float = 1.0


def slot_inputs(inputs: Sequence[TensorSpec], rank: int, adapters: Sequence[Adapter]) -> dict[str, Array]:
    """All LoRA inputs of a graph with slots of `rank`, for these adapters in the slots' order.

    They go where `Conditioning.whole` goes.

    Raises:
        RequestError: more adapters than slots; a scale that is not finite; a module without slots, or whose shapes
            are others; a rank above that of the slots.
    """
    scale = spec_of(inputs, LORA_SCALE)
    slots = int(scale.shape[0]) // rank if scale is not None else 0
    if len(adapters) > slots:
        remedy = "Build the engine with more --lora-slots, or ask for fewer LoRAs."
        raise RequestError("loras", "more than there are slots", got=len(adapters), expected=str(slots), remedy=remedy)
    shapes = {
        spec.name: spec for spec in inputs if spec.name == LORA_SCALE or spec.name.startswith((LORA_DOWN, LORA_UP))
    }
    arrays: dict[str, Array] = {
        name: np.zeros([int(size) for size in spec.shape], spec.dtype) for name, spec in shapes.items()
    }
    for slot, adapter in enumerate(adapters):
        number = finite_number(adapter.scale)
        if number is None or abs(number) > float(np.finfo(np.float32).max):
            raise RequestError(f"loras: {adapter.name}", "scale", got=adapter.scale, expected="a finite float32 number")
        begin = slot * rank
        arrays[LORA_SCALE][begin : begin + rank] = number
        for module, change in adapter.changes.items():
            down, up = _by_rank(arrays, adapter.name, module, rank, change)
            end = begin + len(change.down)
            down[begin:end], up[begin:end] = change.down.reshape(-1, *down.shape[1:]), change.up.T
    return arrays


def module_of(node: str) -> str:
    """The module that a node belongs to by its name: `mid_block.attentions.0.proj_in` of `…proj_in/Conv`."""
    return node.rpartition("/")[0].strip("/").replace("/", ".")


def _by_rank(arrays: Mapping[str, Array], name: str, module: str, rank: int, change: LowRank) -> tuple[Array, Array]:
    """Views of a module's two arrays with the rank first, after a look at whether the change fits them."""
    where = f"loras: {name}: {module}"
    if LORA_DOWN + module not in arrays:
        modules = [one.removeprefix(LORA_DOWN) for one in arrays if one.startswith(LORA_DOWN)]
        remedy = did_you_mean(module, modules) or "Fuse this LoRA at export with `tandemrt export --lora`."
        raise RequestError(where, "no module that has slots", expected=f"one of {len(modules)} modules", remedy=remedy)
    if len(change.down) > rank:
        remedy = "Build the engine with a larger --lora-rank."
        raise RequestError(where, "rank", got=len(change.down), expected=f"at most {rank}", remedy=remedy)
    down, up = arrays[LORA_DOWN + module], arrays[LORA_UP + module]
    down = down.T if down.ndim == 2 else down
    got = change.down.shape, change.up.shape
    expected = (len(change.down), prod(down.shape[1:])), (up.shape[1], len(change.down))
    if got != expected:
        raise RequestError(where, "shapes of down and up", got=got, expected=str(expected))
    return down, up
