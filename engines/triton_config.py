"""Triton Inference Server's `config.pbtxt`: tensors, batches, instances, and the optimization profiles of a plan.

Fields are those of its `model_config.proto`; the rules are those that its ONNX Runtime and TensorRT backends check when
they load a model: one whose tensors all have a first axis of any size takes batches, whose axis `dims` leave out; what
an ONNX graph gives is described as the graph says; a plan is asked for no larger batch than a profile takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.errors import ExportError
from ..runtime.manifest import Dtype, TensorSpec

PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_TYPES: Mapping[Dtype, str] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}


class _Symbol(str):
    """A value of an enumeration, which stands without quotes."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as Triton is told of it.

    backend: `onnxruntime` or `tensorrt`. most: the largest batch that it is to be given. preferred: batches that it is
    tuned for. profiles: how many optimization profiles a plan has. parameters: for whoever reads the file.
    """

    name: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    most: int
    preferred: tuple[int, ...] = ()
    gpu: bool = False
    profiles: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def max_batch_size(self) -> int:
        """The largest batch that Triton makes; 0 where the first axis of a tensor is of one size, or there is none."""
        tensors = (*self.inputs, *self.outputs)
        takes_batches = all(tensor.shape and isinstance(tensor.shape[0], str) for tensor in tensors)
        return self.most if takes_batches else 0


def config(model: Model) -> str:
    """The text of a model's `config.pbtxt`.

    Raises:
        ExportError: a tensor is of a type that the backend does not take.
    """
    return "\n".join((*_lines(_fields(model)), ""))


def _fields(model: Model) -> dict[str, Any]:
    most = model.max_batch_size
    group: dict[str, Any] = {"count": 1, "kind": _Symbol("KIND_GPU" if model.gpu else "KIND_CPU")}
    if model.profiles:
        group["profile"] = [str(index) for index in range(model.profiles)]
    fields: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORMS[model.backend],
        "max_batch_size": most,
        "input": [_tensor(model, tensor) for tensor in model.inputs],
        "output": [_tensor(model, tensor) for tensor in model.outputs],
        "instance_group": [group],
    }
    if most > 1:
        preferred = [size for size in model.preferred if 1 < size <= most]
        fields["dynamic_batching"] = {"preferred_batch_size": preferred} if preferred else {}
    told = [{"key": key, "value": {"string_value": value}} for key, value in sorted(model.parameters.items())]
    return {**fields, "parameters": told} if told else fields


def _tensor(model: Model, tensor: TensorSpec) -> dict[str, Any]:
    """An input or output; one number a sample is told as an axis of 1, since `dims` must not be empty."""
    if tensor.dtype == "bfloat16" and model.backend == "onnxruntime":
        expected = "float32 or float16, which Triton's ONNX Runtime backend takes"
        raise ExportError(model.name, f"type of {tensor.name!r}", got=tensor.dtype, expected=expected)
    shape = tensor.shape[1:] if model.max_batch_size else tensor.shape
    fields = {
        "name": tensor.name,
        "data_type": _Symbol(_TYPES[tensor.dtype]),
        "dims": [size if isinstance(size, int) else -1 for size in shape] or [1],
    }
    return {**fields, "reshape": {"shape": []}} if not shape and model.max_batch_size else fields


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    """A message in protobuf's text format; a list of messages is the field again and again."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and isinstance(value[0], Mapping):
                for one in value:
                    yield from _block(name, one)
            else:
                yield f"{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, fields: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name} {{"
    yield from (f"  {line}" for line in _lines(fields))
    yield "}"


def _scalar(value: str | int) -> str:
    return json.dumps(value) if isinstance(value, str) and not isinstance(value, _Symbol) else str(value)
