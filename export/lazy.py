"""Weights that stay in their files until a layer needs them: modules are built, traced and run without holding them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .weights import Weights

# A module's own tensors by their names in it.
_STORED = "stored_tensors"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, read each time it is asked for."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as the file's header states it."""
        return self.weights.shapes[self.name]

    def load(self) -> Tensor:
        """The values in the dtype they are stored in.

        Raises:
            CheckpointError: the file is damaged.
        """
        return self.weights.load(self.name)

    @cached_property
    def largest(self) -> float:
        """The largest magnitude among the values; NaN or infinite where one of them is."""
        tensor = self.load()
        if not tensor.numel():
            return 0.0
        low, high = tensor.aminmax()
        return max(-float(low), float(high))


def stored_tensors(weights: Weights) -> dict[str, StoredTensor]:
    """Every tensor of a model's weights, none of them read."""
    return {name: StoredTensor(weights, name) for name in weights.shapes}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are made inside have parameters without values; buffers, which may be computed, have theirs."""

    def on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        # One that is on the meta device already may be shared, and stays what it is.
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        hook.remove()


def attach(module: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Tell a module where the values of its parameters and buffers are stored, by their names in its state dict."""
    for name, tensor in tensors.items():
        owner_name, _, own = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        owner.__dict__.setdefault(_STORED, {})[own] = tensor


def attached(module: nn.Module) -> dict[str, StoredTensor]:
    """What `attach` told a module's parts, by full name; parts that are shared appear under each of their names."""
    return {
        f"{prefix}.{own}".removeprefix("."): tensor
        for prefix, part in module.named_modules(remove_duplicate=False)
        for own, tensor in _own(part).items()
    }


@contextlib.contextmanager
def unread(module: nn.Module) -> Iterator[None]:
    """Give a module parameters on the CPU to be traced with, of the right shapes, which hold nothing.

    Their memory is asked for but neither written nor read, so that the system never provides it.
    """
    with _replaced(module, lambda before: torch.empty_like(before, device="cpu")):
        yield


def run(module: nn.Module, *inputs: Tensor) -> Any:
    """A module's output in float32 arithmetic; a layer's weights are in memory only while that layer runs.

    Raises:
        CheckpointError: the weights' file is damaged.
    """

    def load(part: nn.Module, _inputs: object) -> None:
        for own, tensor in _own(part).items():
            values = tensor.load()
            _put(part, own, values.float() if values.is_floating_point() else values)

    def drop(part: nn.Module, _inputs: object, _output: object) -> None:
        for own in _own(part):
            _put(part, own, _nothing(getattr(part, own)))

    with contextlib.ExitStack() as stack, torch.inference_mode():
        stack.enter_context(_replaced(module, _nothing))
        for part in module.modules():
            if _own(part):
                stack.callback(part.register_forward_pre_hook(load).remove)
                stack.callback(part.register_forward_hook(drop, always_call=True).remove)
        return module(*inputs)


def _nothing(tensor: Tensor) -> Tensor:
    """NaN in a tensor's shape for the price of one number: a weight used outside its own layer's forward shows."""
    return torch.full((), torch.nan).to(tensor.dtype).expand(tensor.shape)


@contextlib.contextmanager
def _replaced(module: nn.Module, make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the tensors that are stored be others for a while; what is shared stays shared."""
    before = [(part, own, getattr(part, own)) for part in module.modules() for own in _own(part)]
    made = {id(tensor): _like(tensor, make(tensor)) for _, _, tensor in before}
    try:
        for part, own, tensor in before:
            setattr(part, own, made[id(tensor)])
        yield
    finally:
        for part, own, tensor in before:
            setattr(part, own, tensor)


def _put(part: nn.Module, own: str, tensor: Tensor) -> None:
    setattr(part, own, _like(getattr(part, own), tensor))


def _like(before: Tensor, tensor: Tensor) -> Tensor:
    """A tensor as a parameter where the one before it is one, not a buffer."""
    return nn.Parameter(tensor, requires_grad=False) if isinstance(before, nn.Parameter) else tensor


def _own(part: nn.Module) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = part.__dict__.get(_STORED, {})
    return found
