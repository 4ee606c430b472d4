"""Torch modules as graphs to export: what every kind of model shares, and filling a module strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

from torch import nn

from ..runtime.errors import CheckpointError
from ..runtime.manifest import Role, TensorSpec
from ..runtime.safetensors_files import listed
from .checkpoint import Part
from .lazy import StoredTensor, attach, attached
from .weights import first_line

# What diffusers and transformers raise for a configuration whose values they cannot work with.
UNUSABLE = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError, ZeroDivisionError,
    ImportError,
)  # fmt: skip


class Interface(Protocol):
    """What samples and manifests go by in a graph; see `Graph`."""

    @property
    def role(self) -> Role: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def multiple(self) -> int: ...

    @property
    def parameters(self) -> int: ...


@dataclass(frozen=True)
class Graph:
    """A module to export, with what its ONNX graph takes and gives.

    `module`: its parameters are on the meta device; `lazy.run` runs it. It must not be called
    itself: that raises, or reads memory that was never written.
    `multiple`: height and width, as the graph's main input has them, must be multiples of it.
    `config`: what `config.json` beside the model says, every default written out.
    """

    role: Role
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    config: Mapping[str, Any]
    multiple: int = 1

    @property
    def parameters(self) -> int:
        """How many weights the graph holds."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """Where the values of the module's parameters are stored, by their names in its state dict."""
        return attached(self.module)


def fill(module: nn.Module, tensors: Mapping[str, StoredTensor], part: Part) -> None:
    """Tell a module where its tensors are stored, all of them and no others.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or not finite; they are named.
    """
    where, expected = str(part.weights.files[0]), {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    misfits = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in found.keys() & expected
        if found[name] != expected[name]
    ]
    for what, names in (
        ("missing weights", expected.keys() - found),
        ("weights that the architecture has no place for", found.keys() - expected),
        ("weights of another shape", misfits),
    ):
        if names:
            raise CheckpointError(
                where,
                f"{what}: {listed(names)}",
                expected=f"those of {part.class_name} with {part.config_path}",
            )
    broken = [tensor.name for tensor in tensors.values() if not isfinite(tensor.largest)]
    if broken:
        raise CheckpointError(
            where, f"NaN or infinite weights in {listed(broken)}", remedy="Use an undamaged checkpoint."
        )
    attach(module, tensors)


def extent(size: int | str, symbols: Mapping[str, int]) -> int:
    """A dimension as a number: a symbol such as `height` may stand alone, divided (`height // 2`) or after a factor."""
    if isinstance(size, int):
        return size
    factor, _, symbol = size.rpartition(" * ")
    symbol, _, divisor = symbol.partition(" // ")
    return int(factor or 1) * symbols[symbol] // int(divisor or 1)


def full_config(resolved: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """What `config.json` is to say: a model's resolved configuration, under what the part's own states."""
    public = {key: value for key, value in resolved.items() if not key.startswith("_")}
    return {**public, **part.config}


def frozen(module: nn.Module) -> nn.Module:
    """The module itself, set to inference and without gradients."""
    return module.eval().requires_grad_(False)


def float_spec(name: str, *shape: int | str) -> TensorSpec:
    """A float32 tensor of a graph, its symbolic dimensions as strings."""
    return TensorSpec(name=name, dtype="float32", shape=shape)


def unusable(part: Part, error: Exception) -> CheckpointError:
    """The error for a configuration that a model's class cannot work with."""
    return CheckpointError(
        str(part.config_path),
        f"{part.class_name} cannot be built from it ({first_line(error)})",
        remedy="Check its values.",
    )
