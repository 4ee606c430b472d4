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

from tandemrt.export.weights import parameters, read_header, source_digest
from tandemrt.runtime.errors import CheckpointError
from tandemrt.runtime.safetensors_files import MAX_HEADER_BYTES, read_json

STEM = "diffusion_pytorch_model"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{STEM}.safetensors"
    save_file({"a": torch.ones(3, 4).half(), "b": torch.arange(5)}, path)
    return path


def test_tensors_are_read_as_they_are_stored(tmp_path: Path) -> None:
    kinds = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )  # fmt: skip
    stored = {str(kind): (torch.arange(12) % 5).reshape(3, 4).to(kind) for kind in kinds}
    stored.update(scalar=torch.tensor(2.5), empty=torch.zeros(0, 3))
    save_file(stored, tmp_path / f"{STEM}.safetensors")
    header = read_header(tmp_path / f"{STEM}.safetensors")
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert parameters(header) == 12 * len(kinds) + 1
    for name, tensor in stored.items():
        assert header.load(name).dtype == tensor.dtype
        assert torch.equal(header.load(name), tensor)


def test_a_file_that_shrinks_after_its_header_was_read_is_damaged(file: Path) -> None:
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(header.load("b"), torch.arange(5))
    with pytest.raises(CheckpointError, match=r"safetensors: a: truncated, got 23, expected 24 bytes"):
        header.load("a")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be read \(No such file or directory\)"):
        header.load("b")


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
