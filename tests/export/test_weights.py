"""Safetensors files: what is refused before and while weights are read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tandemrt.export.weights import (
    MAX_HEADER_BYTES,
    load_tensors,
    parameters,
    read_header,
    read_json,
    source_digest,
)
from tandemrt.runtime.errors import CheckpointError

STEM = "diffusion_pytorch_model"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{STEM}.safetensors"
    save_file({"a": torch.ones(3, 4).half(), "b": torch.arange(5)}, path)
    return path


def test_half_precision_is_read_as_float32(file: Path) -> None:
    header = read_header(file)
    tensors = load_tensors(header)
    assert header.shapes == {"a": (3, 4), "b": (5,)}
    assert parameters(header) == 17
    assert tensors["a"].dtype == torch.float32
    assert tensors["b"].dtype == torch.int64


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_or_grown_anywhere_is_refused_by_name(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    damaged = file.with_name("damaged.safetensors")
    kept = data.draw(st.integers(0, len(whole) + 5).filter(lambda size: size != len(whole)))
    damaged.write_bytes((whole + bytes(5))[:kept])
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: .*Download the file again"):
        read_header(damaged)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "a: data_offsets, got .0, 4., expected a span of 8",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "data_offsets"),
        (
            {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
            "x.safetensors: a: dtype that is not supported, got 'F8_E4M3', expected one of F64, F32",
        ),
        ({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 8]}}, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, math.inf]}}, "not a safetensors header"),
        ({"a": {"shape": [2]}}, "not a safetensors header"),
        (["a"], "not a safetensors header"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, header: object, complaint: str) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(CheckpointError, match=complaint):
        read_header(path)


def test_an_oversized_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with pytest.raises(CheckpointError, match=rf"header size, got {MAX_HEADER_BYTES + 1}, expected 2\.\."):
        read_header(path)


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match=r"a Git LFS pointer, not the file itself\. Run `git lfs pull`"):
        read_header(path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / f"{STEM}.safetensors"
    save_file({"good": torch.ones(2), "bad.weight": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in bad\.weight"):
        load_tensors(read_header(path))


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"[]", "got 'list'"), (b"[" * 99_999, "not JSON")],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, raw: bytes, complaint: str) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=complaint):
        read_json(tmp_path / "config.json")


def test_the_digest_covers_names_and_contents(file: Path) -> None:
    other = file.with_name("config.json")
    other.write_text("{}")
    digest = source_digest([file, other])
    assert digest == source_digest([other, file])
    other.write_text("{ }")
    assert source_digest([file, other]) != digest


def test_a_file_of_several_models_is_read_for_their_digests_once(file: Path) -> None:
    known: dict[Path, str] = {}
    digest = source_digest([file], known=known)
    assert list(known) == [file]
    file.unlink()
    assert source_digest([file], known=known) == digest
    with pytest.raises(CheckpointError, match="cannot be read"):
        source_digest([file])
