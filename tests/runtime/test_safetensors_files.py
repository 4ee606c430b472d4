"""Safetensors files as numpy reads them; what is refused of a header, tests/export/test_weights.py has."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tandemrt.runtime.errors import CheckpointError
from tandemrt.runtime.safetensors_files import read_header, write_safetensors


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


def entry(*offsets: int) -> str:
    return json.dumps({"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets})


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (f'{{"a": {entry(0, 4)}, "b": {entry(2, 6)}}}', "b: data_offsets, got 2, expected 4, where the tensor before"),
        (f'{{"b": {entry(0, 6)}, "a": {entry(0, 4)}}}', "b: data_offsets, got 0, expected 4"),
        (f'{{"a": {entry(0, 2)}, "b": {entry(4, 6)}}}', "b: data_offsets, got 4, expected 2"),
        (f'{{"a": {entry(2, 6)}}}', "a: data_offsets, got 2, expected 0"),
        (f'{{"a": {entry(0, 6)}, "a": {entry(0, 6)}}}', "not a safetensors header .*'a' twice"),
        ('{"a": {"dtype": "U8", "dtype": "I8", "shape": [6], "data_offsets": [0, 6]}}', "'dtype' twice"),
    ],
)
def test_tensors_that_do_not_lie_one_behind_the_other_are_refused(tmp_path: Path, header: str, told: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(6))
    with pytest.raises(CheckpointError, match=told):
        read_header(path)


def test_tensors_of_nothing_may_lie_anywhere_between(tmp_path: Path) -> None:
    header = f'{{"c": {entry(4, 4)}, "b": {entry(4, 6)}, "a": {entry(0, 4)}, "d": {entry(0, 0)}}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(range(6)))
    np.testing.assert_array_equal(read_header(path).array("b"), [4, 5])


def test_what_is_written_is_read_here_and_elsewhere(tmp_path: Path) -> None:
    tensors = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "ids": np.array([[1, -2]], np.int64),
        "halves": np.array([0.5, np.inf], np.float16),
        "none": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "one.safetensors"
    with path.open("wb") as stream:
        write_safetensors(stream, tensors, {"prompt": "ein Würfel"})
    ours, theirs = read_header(path), safe_open(path, "numpy")
    assert ours.metadata == theirs.metadata() == {"prompt": "ein Würfel"}
    for name, values in tensors.items():
        for read in (ours.array(name), theirs.get_tensor(name)):
            assert read.dtype == values.dtype
            assert np.array_equal(read, values)
