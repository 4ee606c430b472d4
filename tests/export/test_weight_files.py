"""Which files hold a folder's weights: variants, shards, pickles, and what an index or a pickle may not do."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tandemrt.export.checkpoint import read_checkpoint, read_denoiser
from tandemrt.export.weight_files import find_weights
from tandemrt.runtime.errors import CheckpointError

from .mini import UNET_FILE, unet

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
PICKLE_INDEX = f"{STEM}.bin.index.json"


def save_shards(folder: Path, index: str = INDEX, save: Callable[..., object] = save_file) -> dict[str, str]:
    """Two shards and their index, which is returned."""
    suffix = index.split(".")[1]
    names = [f"{STEM}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    save({"a": torch.ones(2), "b": torch.ones(3)}, folder / names[0])
    save({"c": torch.full((4,), 2.0)}, folder / names[1])
    weight_map = {"a": names[0], "b": names[0], "c": names[1]}
    write_index(folder / index, weight_map)
    return weight_map


def write_index(path: Path, weight_map: object) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))


def test_a_variant_is_taken_where_it_stands_alone(tmp_path: Path) -> None:
    for variant in ("fp16", "non_ema"):
        path = tmp_path / f"{STEM}.{variant}.safetensors"
        save_file({"a": torch.ones(2)}, path)
        assert find_weights(tmp_path, STEM).files == (path,)
        save_file({"a": torch.ones(3)}, tmp_path / f"{STEM}.safetensors")
        assert find_weights(tmp_path, STEM).shapes == {"a": (3,)}
        (tmp_path / f"{STEM}.safetensors").unlink()
        path.rename(tmp_path / "elsewhere")


def test_a_pickled_denoiser_of_one_file_is_read_by_leave(checkpoint: Path, tmp_path: Path) -> None:
    main = read_checkpoint(checkpoint)
    torch.save(unet().state_dict(), tmp_path / "unet.bin")
    with pytest.raises(CheckpointError, match=r"unet\.bin: pickled weights are refused"):
        read_denoiser(tmp_path / "unet.bin", main)
    part = read_denoiser(tmp_path / "unet.bin", main, allow_pickle=True).part
    assert part.weights.shapes == main.denoiser.weights.shapes


def test_of_several_variants_none_is_guessed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / f"{STEM}.fp16.safetensors")
    write_index(tmp_path / f"{STEM}.safetensors.index.bf16.json", {})
    with pytest.raises(CheckpointError, match=r"several variants of the weights, got 'bf16, fp16'"):
        find_weights(tmp_path, STEM)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards_as_diffusers_saves_them_are_the_whole_model(
    checkpoint: Path, tmp_path: Path, variant: str | None, safe: bool
) -> None:
    model = unet()
    model.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB", safe_serialization=safe)
    assert not [path for path in tmp_path.iterdir() if path.stem == STEM]
    weights = read_denoiser(tmp_path, read_checkpoint(checkpoint), allow_pickle=not safe).part.weights
    assert len(weights.files) > 2
    assert dict(weights.shapes) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(weights.load(name), tensor) for name, tensor in model.state_dict().items())


def test_shards_as_transformers_saves_them_are_the_whole_model(tmp_path: Path) -> None:
    model = CLIPTextModel(CLIPTextConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=2))
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.fp16.json").is_file()
    assert len(find_weights(tmp_path, "model").shapes) == len(model.state_dict())


DAMAGES: dict[str, tuple[Callable[[Path, dict[str, str]], object], str]] = {
    "a path out of the folder": (
        lambda folder, index: write_index(folder / INDEX, {**index, "a": "../x.safetensors"}),
        rf"{INDEX}: weight_map: shard, got '\.\./x\.safetensors', expected the name of a file in",
    ),
    "an absolute path": (
        lambda folder, index: write_index(folder / INDEX, {**index, "a": str(folder / index["a"])}),
        "weight_map: shard, got '/",
    ),
    "a name with a zero byte": (
        lambda folder, index: write_index(folder / INDEX, {**index, "a": "x\0.safetensors"}),
        r"weight_map: shard, got 'x\\x00",
    ),
    "a shard that is no name": (
        lambda folder, index: write_index(folder / INDEX, {**index, "a": {}}),
        r"weight_map: shard, got \{\}",
    ),
    "a missing shard": (
        lambda folder, index: (folder / index["c"]).unlink(),
        r"00002-of-00002\.safetensors: a shard that is missing",
    ),
    "a damaged shard": (
        lambda folder, index: (folder / index["c"]).write_bytes(b"{}"),
        r"00002-of-00002\.safetensors: safetensors header size",
    ),
    "a tensor that is in no shard": (
        lambda folder, index: write_index(folder / INDEX, {**index, "d": index["c"]}),
        rf"00002-of-00002\.safetensors: tensors that {INDEX} states and the file does not hold: d",
    ),
    "a tensor that is not in the index": (
        lambda folder, index: write_index(folder / INDEX, {name: index[name] for name in "ac"}),
        rf"00001-of-00002\.safetensors: tensors that {INDEX} does not state for it: b",
    ),
    "a tensor in two shards": (
        lambda folder, index: save_file({"a": torch.ones(2), "c": torch.ones(4)}, folder / index["c"]),
        r"00002-of-00002\.safetensors: tensors that .* does not state for it: a",
    ),
    "no map": (lambda folder, index: write_index(folder / INDEX, ["a"]), r"weight_map: content, got \['a'\]"),
    "an empty map": (lambda folder, index: write_index(folder / INDEX, {}), "weight_map: content, got {}"),
    "no JSON": (lambda folder, index: (folder / INDEX).write_text("{"), f"{INDEX}: not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_tells_another_tale_than_its_shards_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    break_it, complaint = DAMAGES[damage]
    break_it(tmp_path, save_shards(tmp_path))
    with pytest.raises(CheckpointError, match=complaint):
        find_weights(tmp_path, STEM)


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for name in set(save_shards(tmp_path).values()):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / name)
    (tmp_path / "snapshot" / INDEX).symlink_to(tmp_path / INDEX)
    weights = find_weights(tmp_path / "snapshot", STEM)
    assert torch.equal(weights.load("c"), torch.full((4,), 2.0))
    assert weights.files[0].name == INDEX


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (f"{STEM}.bin", r"pickled weights are refused, because.*save_pretrained.*--allow-pickle"),
        (f"{STEM}.fp16.bin", r"pickled weights are refused"),
        ("model.ckpt", r"pickled weights are refused"),
        ("readme.md", r"no weights, expected diffusion_pytorch_model\.safetensors"),
    ],
)
def test_other_weights_are_refused_with_what_to_do(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=complaint):
        find_weights(tmp_path, STEM)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("stem", "name"), [(STEM, f"{STEM}.bin"), ("model", "pytorch_model.bin")])
def test_pickled_weights_are_read_where_that_is_allowed(tmp_path: Path, stem: str, name: str, zipped: bool) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).half(), "b": torch.ones(3)}
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
    weights = find_weights(tmp_path, stem, allow_pickle=True)
    assert weights.shapes == {"a": (2, 3), "b": (3,)}
    assert weights.files == (tmp_path / name,)
    assert torch.equal(weights.load("a"), tensors["a"])


def test_safe_weights_are_preferred_to_pickled_ones(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / f"{STEM}.bin")
    save_file({"a": torch.ones(2)}, tmp_path / f"{STEM}.fp16.safetensors")
    assert find_weights(tmp_path, STEM, allow_pickle=True).shapes == {"a": (2,)}


class Attack:
    """Unpickled without restriction it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("struck",)


class Evaluation:
    """The same by a builtin."""

    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.eval, ("__import__('os').mkdir('struck')",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            {"a": Attack()},
            r"x\.bin: torch's restricted unpickler refuses it .unsupported GLOBAL \w+\.mkdir whose module",
        ),
        ({"a": Evaluation()}, r"restricted unpickler refuses it .Unsupported.*eval"),
        ({"a": torch.nn.Linear(1, 1)}, r"refuses it .Unsupported global: GLOBAL torch\.nn\.modules\.linear\.Linear"),
        ([torch.ones(1)], "content, got 'list', expected a state dict"),
        ({}, "content, got 'dict'"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict': entry, got 'dict', expected a tensor under a name"),
        ({3: torch.ones(1)}, "3: entry, got 'Tensor'"),
        ({"a": torch.ones(1).expand(1 << 40)}, "a: tensor that is not supported"),
        ({"a": torch.eye(2).to_sparse()}, "a: tensor that is not supported"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "a: dtype that is not supported, got 'complex64'"),
        ({"a": torch.ones(1, device="meta")}, "a: tensor that is not supported"),
        (
            {"a": torch.ones(1).to(torch.float8_e4m3fn)},
            r"a: dtype that is not supported, got 'float8_e4m3fn', expected one of float64",
        ),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        find_weights(tmp_path, "x", allow_pickle=True)
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"\x80\x02.", b"version https://git-lfs", bytes(100)])
def test_a_pickle_that_is_damaged_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.bin: ") as caught:
        find_weights(tmp_path, "x", allow_pickle=True)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pickle_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    for kept in range(0, len(whole), 97):
        (tmp_path / "x.bin").write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"x\.bin: "):
            find_weights(tmp_path, "x", allow_pickle=True)


def test_pickled_shards_are_held_to_their_index(tmp_path: Path) -> None:
    index = save_shards(tmp_path, PICKLE_INDEX, torch.save)
    assert torch.equal(find_weights(tmp_path, STEM, allow_pickle=True).load("c"), torch.full((4,), 2.0))
    torch.save({"c": Attack()}, tmp_path / index["c"])
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: torch's restricted unpickler"):
        find_weights(tmp_path, STEM, allow_pickle=True)


def test_leave_to_unpickle_reaches_every_part(own_checkpoint: Path) -> None:
    path = own_checkpoint / "unet" / UNET_FILE
    torch.save(unet().state_dict(), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin: pickled weights are refused"):
        read_checkpoint(own_checkpoint)
    assert read_checkpoint(own_checkpoint, allow_pickle=True).denoiser.weights.files == (path.with_suffix(".bin"),)
