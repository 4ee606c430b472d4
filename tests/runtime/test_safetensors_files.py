"""Safetensors files as numpy reads them; what is refused of a header, tests/export/test_weights.py has."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime.errors import CheckpointError
from tandemrt.runtime.safetensors_files import read_header


def written(path: Path, header: dict[str, Any], content: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content)
    return path


@pytest.mark.parametrize(
    ("dtype", "content", "expected"),
    [
        ("F16", np.array([0.5, -2], "<f2").tobytes(), np.array([0.5, -2], np.float16)),
        ("BF16", b"\x80\x3f\x40\xc0", np.array([1.0, -3.0], np.float32)),
        ("F64", np.array([0.1, 3], "<f8").tobytes(), np.array([0.1, 3])),
        ("BOOL", b"\x01\x00", np.array([True, False])),
    ],
)
def test_numbers_are_read_as_they_are_stored(tmp_path: Path, dtype: str, content: bytes, expected: Any) -> None:
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, len(content)]}
    array = read_header(written(tmp_path / "x.safetensors", {"a": entry}, content)).array("a")
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("shape", [[-1, -2], [0, 1 << 60], [1 << 70, 0]])
def test_a_shape_that_no_array_has_is_refused(tmp_path: Path, shape: list[int]) -> None:
    size = 8 if min(shape) < 0 else 0
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    with pytest.raises(CheckpointError, match="not a safetensors header"):
        read_header(written(tmp_path / "x.safetensors", {"a": entry}, bytes(size)))
