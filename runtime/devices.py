"""Which GPUs a pipeline runs on, as callers name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .arguments import whole_number
from .backends import target_here
from .errors import ArgumentError
from .targets import ENGINES_ONLY, Target

_WHERE = "devices"


def on_devices(target: Target, devices: object) -> Target:
    """A target on the GPUs of these indices; None for the first.

    devices: one or two of CUDA's indices, the first for all but the second branch of guidance.

    Raises:
        ArgumentError: they are no such indices, one is named twice, or the target takes none.
    """
    if devices is None:
        return target
    if not isinstance(devices, Sequence) or isinstance(devices, str | bytes):
        raise ArgumentError(_WHERE, "type", got=devices, expected="indices of GPUs such as (0, 1)")
    indices = tuple(whole_number(one) for one in devices)
    if any(one is None or one < 0 for one in indices):
        raise ArgumentError(_WHERE, "index of a GPU", got=tuple(devices), expected="whole numbers from 0")
    if not 1 <= len(indices) <= 2:
        expected = "one or two: guidance has two branches"
        raise ArgumentError(_WHERE, f"{len(indices)} GPUs", got=indices, expected=expected)
    if len(set(indices)) < len(indices):
        expected, remedy = "two of different indices", "For two streams on one GPU name it once."
        raise ArgumentError(_WHERE, "one device asked to be two", got=indices, expected=expected, remedy=remedy)
    if target.backend not in ENGINES_ONLY:
        remedy = "Leave devices out."
        if target.backend == "onnxruntime" and target.device != "cpu":
            remedy += " CUDA_VISIBLE_DEVICES chooses the GPU of ONNX Runtime."
        what, expected = "GPUs for a target that takes none", "a flavour of TensorRT, such as tensorrt-rtx:sm89"
        raise ArgumentError(_WHERE, what, got=str(target), expected=expected, remedy=remedy)
    return replace(target, gpus=tuple(one for one in indices if one is not None))


def require_devices(target: Target) -> None:
    """Check that a target of engines alone has its GPUs here, each of an architecture that it names.

    Raises:
        TargetError: one is not here, or is another.
    """
    for place in range(len(target.gpus)):
        # The others behind it, which the error's remedy is for.
        target_here(replace(target, gpus=target.gpus[place:] + target.gpus[:place]))
