"""Messages between machines: a safetensors file in memory, whose metadata is sealed together with its tensors.

They are untrusted: everything is checked before it is used, and every byte counts in the seal, which tells damage, not
who sent them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, MessageError, RequestError
from .safetensors_files import described, write_safetensors

Float32 = npt.NDArray[np.float32]
# Some hundred bytes are needed, and a prompt.
MAX_HEADER_BYTES = 64 << 10
_AGAIN = "Send it again."
_DTYPES = {"F32": "float32", "F16": "float16"}
_SEAL = "sha256"


def packed(tensors: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, str]) -> bytes:
    """A message of float32 and float16 tensors and of texts by key."""
    stream = io.BytesIO()
    write_safetensors(stream, tensors, {**facts, _SEAL: _seal(facts, tensors)})
    return stream.getvalue()


def unpacked(
    where: str, message: bytes, tensors: Mapping[str, int], facts: Mapping[str, bool]
) -> tuple[dict[str, Float32], dict[str, str]]:
    """A message's tensors, as float32, and its texts.

    tensors: how many dimensions those have that may be in it. facts: the keys there may be, and whether they must.

    Raises:
        MessageError: it is no such message, or is damaged.
        RequestError: a tensor is of another kind, or holds NaN or Inf.
    """
    try:
        header = described(where, message, MAX_HEADER_BYTES)
    except CheckpointError as error:
        raise MessageError(error.where, error.without_remedy.partition(": ")[2], remedy=_AGAIN) from error
    texts = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
    known = {*facts, _SEAL}
    lacks = [key for key, needed in {**facts, _SEAL: True}.items() if needed and key not in texts]
    if lacks or len(texts) != len(header.metadata) or not known.issuperset(texts):
        expected = f"texts of {', '.join(sorted(known))}"
        raise MessageError(where, "metadata", got=sorted(header.metadata), expected=expected)
    for name, place in header.places.items():
        if place.dtype not in _DTYPES or tensors.get(name) != len(header.shapes[name]):
            got = f"{name!r} in {place.dtype} {header.shapes[name]}"
            expected = ", ".join(f"{name!r} of {count} dimensions" for name, count in tensors.items())
            raise RequestError(where, "tensors", got=got, expected=f"{expected}, in F32 or F16")
    stored = {
        name: np.frombuffer(message, _DTYPES[place.dtype], place.size // np.dtype(_DTYPES[place.dtype]).itemsize,
                            place.offset).reshape(header.shapes[name])
        for name, place in header.places.items()
    }  # fmt: skip
    told = texts.pop(_SEAL)
    if (seal := _seal(texts, stored)) != told:
        raise MessageError(where, _SEAL, got=told, expected=seal, remedy=_AGAIN)
    for name, values in stored.items():
        if not np.isfinite(values).all():
            raise RequestError(f"{where}: {name}", "holds NaN or Inf", expected="finite values")
    return {name: values.astype(np.float32) for name, values in stored.items()}, texts


def _seal(facts: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """The sha256 of the texts, of the tensors' names, dtypes and shapes, and of their bytes; see docs/serve.md."""
    shapes = [[name, values.dtype.str, values.shape] for name, values in sorted(tensors.items())]
    seal = hashlib.sha256(json.dumps([sorted(facts.items()), shapes], separators=(",", ":")).encode())
    for _, values in sorted(tensors.items()):
        seal.update(np.ascontiguousarray(values).data)
    return seal.hexdigest()
