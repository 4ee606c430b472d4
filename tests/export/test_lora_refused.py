"""LoRAs that cannot be fused, or are for another base: they are refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tandemrt.export.lora import fuse, read_lora, require_used
from tandemrt.runtime.errors import CheckpointError

from .lora_files import (
    Tensors,
    parts,
    sd15,
    update,
    write_lora,
    write_weights,
)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"{m}.dora_scale": torch.ones(8, 1)}, r"dora_scale: DoRA is not supported, got .*Merge it into its base"),
        ({"{m}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector: DoRA is not supported"),
        ({"x.alpha": torch.ones(()), "x.hada_w1_a": torch.ones(8, 2)}, "hada_w1_a: LoHa is not supported"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "lokr_w1: LoKr is not supported"),
        ({"{m}.lora_mid.weight": torch.ones(1, 1, 3, 3)}, "lora_mid.weight: a convolution in three factors is not"),
        ({"{m}.diff_b": torch.ones(8)}, r"diff_b: a tensor that is no low-rank update, got 'shape \(8,\)'"),
        ({"{m}.diff": torch.full((8, 4), 1e-3)}, "diff: a tensor that is no low-rank update"),
        ({"x.alpha": torch.ones(())}, "x.alpha: a tensor that is no low-rank update"),
        ({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, "conv_in.weight: a tensor that is no low-rank update"),
        ({"x.lora_up.weight": torch.ones(8, 1)}, r"x.lora_up.weight: half of an update, expected x.lora_down.weight"),
        ({"x.lora_A.weight": torch.ones(1, 8)}, r"x.lora_A.weight: half of an update, expected x.lora_B.weight"),
        ({"{m}.alpha": torch.ones(2)}, r"alpha: shape, got \(2,\), expected one number"),
        (
            {"{m}.lora_up.weight": torch.ones(8, 2, 1, 1)},
            r"lora_down.weight: ranks of the two halves .* \(8, 2, 1, 1\)",
        ),
        ({"{m}.lora_up.weight": torch.ones(8, 1, 3, 1)}, "lora_down.weight: ranks of the two halves"),
        (
            {"{m}.lora_down.weight": torch.ones(0, 4, 3, 3), "{m}.lora_up.weight": torch.ones(8, 0, 1, 1)},
            "ranks of the",
        ),
        ({"{m}.lora_down.weight": torch.ones(1)}, "ranks of the two halves"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(tmp_path: Path, extra: Tensors, complaint: str) -> None:
    changed = {name.format(m="lora_unet_conv_in"): tensor for name, tensor in extra.items()}
    path = write_lora({**update("lora_unet_conv_in", (8, 4, 3, 3)), **changed}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_lora(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_changes_by_nothing_are_let_through(tmp_path: Path) -> None:
    nothing = {"lora_unet_conv_in.diff_b": torch.zeros(8), "lora_unet_conv_norm_out.diff": torch.zeros(8)}
    path = write_lora({**update("lora_unet_conv_in", (8, 4, 3, 3)), **nothing}, tmp_path / "x.safetensors")
    assert [each.module for each in read_lora(path).updates] == ["lora_unet_conv_in"]


def test_files_that_hold_no_lora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: cannot be read .No such file"):
        read_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no LoRA in it, expected tensors such as"):
        read_lora(write_lora({"y.diff": torch.zeros(1)}, tmp_path / "x.safetensors"))
    (tmp_path / "x.pt").touch()
    with pytest.raises(CheckpointError, match=r"x\.pt: pickled weights are refused.*--allow-pickle"):
        read_lora(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"not a folder of peft's, expected adapter_config\.json"):
        read_lora(tmp_path)


def test_loras_for_another_base_are_refused(tmp_path: Path) -> None:
    weights = parts(sd15(), tmp_path)
    for tensors, complaint in (
        (
            update("lora_unet_add_embedding_linear_1", (8, 4)),
            r"lora_unet_add_embedding_linear_1.lora_down.weight: a LoRA for another base model: 1 of 2 updates have no "
            r"weight to change, got 'an update of shape \(8, 4\)', expected modules of text_encoder, unet. Give it",
        ),
        (update("base_model.model.text_model.encoder.layers.0.mlp.fc1", (32, 16)), "1 of 2 updates"),
    ):
        path = write_lora({**tensors, **update("lora_unet_conv_in", (8, 4, 3, 3))}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=complaint):
            require_used(read_lora(path), weights)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("conv_in", (8, 9, 3, 3)),
        ("conv_in", (8, 4)),
        ("conv_in", (8, 4, 1, 1)),
        ("time_embedding.linear_1", (33, 8)),
        ("time_embedding.linear_1", (32, 8, 3, 3)),
    ],
)
def test_updates_of_another_shape_are_refused(tmp_path: Path, module: str, shape: tuple[int, ...]) -> None:
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    lora = read_lora(write_lora(update(f"unet.{module}", shape), tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        fuse(weights, [(lora, 1.0)], "unet")
    message = str(caught.value)
    assert f"x.safetensors: unet.{module}.lora_down.weight: a LoRA for another base model" in message
    assert f"got {shape}, expected {weights.shapes[f'{module}.weight']}. Give it to the base model" in message


def test_two_updates_of_one_weight_are_refused(tmp_path: Path) -> None:
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    twice = {**update("lora_unet_conv_in", (8, 4, 3, 3)), **update("lora_unet_input_blocks_0_0", (8, 4, 3, 3))}
    lora = read_lora(write_lora(twice, tmp_path / "x.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"a second update of conv_in\.weight, got 'lora_unet_.* too', expected one"
    ):
        fuse(weights, [(lora, 1.0)], "unet")


@pytest.mark.parametrize("broken", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_named(tmp_path: Path, broken: str, value: float) -> None:
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    tensors = {**update("lora_unet_conv_in", (8, 4, 3, 3)), "lora_unet_conv_in.alpha": torch.ones(())}
    tensors[f"lora_unet_conv_in.{broken}"].view(-1)[0] = value
    lora = read_lora(write_lora(tensors, tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match=r"x.safetensors: lora_unet_conv_in.lora_down.weight: .*NaN or infinite"):
        fuse(weights, [(lora, 0.0)], "unet").load("conv_in.weight")
