"""LoRAs as inputs: what a graph with slots for them takes, and low-rank changes of weights laid out for it.

A module that has slots adds (x · down) · scale · up to what it makes of x. S slots of rank R are S·R columns of `down`
and rows of `up`, of which each LoRA takes as many as its rank, one behind the other. The rest are zeros and change
nothing.

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
    """A LoRA for one component: changes by module, and how strongly it is wanted; at 0 it changes no bit.

    name: how it is called in errors, its path. stamp: tells its file from another under the same name.
    """

    name: str
    changes: Mapping[str, LowRank]
    scale: float = 1.0
    stamp: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank among the changes."""
        return max(len(change.down) for change in self.changes.values())

    @property
    def key(self) -> tuple[str, tuple[int, ...], float]:
        """What its effect depends on."""
        return self.name, self.stamp, self.scale


def slot_inputs(inputs: Sequence[TensorSpec], adapters: Sequence[Adapter]) -> dict[str, Array]:
    """All LoRA inputs of a graph, for these adapters one behind the other; none for a graph without slots.

    Raises:
        RequestError: adapters whose ranks come to more than the slots hold together; a scale that is not finite; a
            module without slots, or whose shapes are others.
    """
    dtypes = {spec.name: spec.dtype for spec in inputs}
    arrays: dict[str, Array] = {name: np.zeros(shape, dtypes[name]) for name, shape in slot_shapes(inputs).items()}
    columns = len(arrays[LORA_SCALE]) if arrays else 0
    needed = sum(adapter.rank for adapter in adapters)
    if needed > columns:
        remedy = "Build the engine with more --lora-slots or a larger --lora-rank, or ask for fewer LoRAs."
        raise RequestError("loras", "ranks of all together", got=needed, expected=f"at most {columns}", remedy=remedy)
    begin = 0
    for adapter in adapters:
        arrays[LORA_SCALE][begin : begin + adapter.rank] = float32_scale(adapter)
        for module, change in adapter.changes.items():
            down, up = _by_rank(arrays, f"loras: {adapter.name}: {module}", module, change)
            end = begin + len(change.down)
            down[begin:end], up[begin:end] = change.down.reshape(-1, *down.shape[1:]), change.up.T
        begin += adapter.rank
    return arrays


def float32_scale(adapter: Adapter) -> float:
    """How strongly an adapter is wanted; raises RequestError where that is no finite float32 number."""
    number = finite_number(adapter.scale)
    if number is None or abs(number) > float(np.finfo(np.float32).max):
        raise RequestError(f"loras: {adapter.name}", "scale", got=adapter.scale, expected="a finite float32 number")
    return float(np.float32(number))


def slot_shapes(inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The shapes of a graph's LoRA inputs, which a call does not choose; none for a graph without slots."""
    specs = (spec for spec in inputs if spec.name == LORA_SCALE or spec.name.startswith((LORA_DOWN, LORA_UP)))
    return {spec.name: tuple(map(int, spec.shape)) for spec in specs}


def slot_widths(inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, int]]:
    """For each module that has slots, the lengths of a row of `LowRank.down` and of a column of `LowRank.up`."""
    shapes = {spec.name: [int(size) for size in spec.shape] for spec in inputs if spec.name.startswith("lora_")}
    downs = {name.removeprefix(LORA_DOWN): shape for name, shape in shapes.items() if name.startswith(LORA_DOWN)}
    return {
        module: (prod(shape[1:]) if len(shape) == 4 else shape[0], shapes[LORA_UP + module][1])
        for module, shape in downs.items()
    }


def module_of(node: str) -> str:
    """The module that a node belongs to by its name: `mid_block.attentions.0.proj_in` of `…proj_in/Conv`."""
    return node.rpartition("/")[0].strip("/").replace("/", ".")


def _by_rank(arrays: Mapping[str, Array], where: str, module: str, change: LowRank) -> tuple[Array, Array]:
    """Views of a module's two arrays with the rank first, after a look at whether the change fits them."""
    if LORA_DOWN + module not in arrays:
        modules = [one.removeprefix(LORA_DOWN) for one in arrays if one.startswith(LORA_DOWN)]
        remedy = did_you_mean(module, modules) or "Fuse this LoRA at export with `tandemrt export --lora`."
        raise RequestError(where, "no module that has slots", expected=f"one of {len(modules)} modules", remedy=remedy)
    down, up = arrays[LORA_DOWN + module], arrays[LORA_UP + module]
    down = down.T if down.ndim == 2 else down
    got = change.down.shape, change.up.shape
    expected = (len(change.down), prod(down.shape[1:])), (up.shape[1], len(change.down))
    if got != expected:
        raise RequestError(where, "shapes of down and up", got=got, expected=str(expected))
    return down, up
