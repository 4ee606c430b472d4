"""LoRAs with a configuration beside them: folders of peft's, and headers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tandemrt.export.lora import fuse, read_lora
from tandemrt.runtime.errors import CheckpointError

from .lora_files import (
    sd15,
    update,
    write_lora,
    write_weights,
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"peft_type": "LOHA"}, "peft_type: not a plain LoRA, got 'LOHA', expected 'LORA' or None"),
        ({"use_dora": True}, "use_dora: not a plain LoRA, got True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: not a plain LoRA, got 'pissa_niter_4'"),
        ({"r": 3}, "adapter_config.json: conv_in: rank that differs from the tensors', got 3.0, expected 1"),
        ({"rank_pattern": {"in": 2}, "r": 1}, None),
        ({"rank_pattern": {"(.*)*x": 1}}, "rank_pattern: patterns, got .*expected names of modules"),
        ({"alpha_pattern": [1]}, "alpha_pattern: patterns"),
        ({"lora_alpha": None}, "lora_alpha: number, got None"),
        ({"lora_alpha": 10**400}, "lora_alpha: number, got 1000"),
        ({"lora_alpha": math.nan}, "lora_alpha: number, got nan"),
        (None, "adapter_model.bin: pickled weights are refused"),
    ],
)
def test_folders_of_peft_are_held_to_their_configuration(
    tmp_path: Path, change: dict[str, Any] | None, complaint: str | None
) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, **(change or {})}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if change is None:
        (tmp_path / "adapter_model.bin").touch()
    else:
        write_lora(
            update("base_model.model.conv_in", (8, 4), "lora_A", "lora_B"), tmp_path / "adapter_model.safetensors"
        )
    if complaint is None:
        assert read_lora(tmp_path).updates[0].alpha == 2
    else:
        with pytest.raises(CheckpointError, match=complaint):
            read_lora(tmp_path)


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model."])
def test_a_folder_has_one_configuration_for_every_module(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    write_lora(update(f"{prefix}conv_in", (8, 4), "lora_A", "lora_B"), tmp_path / "adapter_model.safetensors")
    assert read_lora(tmp_path).updates[0].alpha == 2


def test_a_header_that_configures_other_modules_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"text_encoder.r": 1, "text_encoder.lora_alpha": 2})
    path = write_lora(update("unet.conv_in", (8, 4)), tmp_path / "x.safetensors", lora_adapter_metadata=header)
    complaint = r"unet\.conv_in\.lora_down.*says nothing of, got \"prefix 'unet\.'\", expected 'text_encoder\.'"
    with pytest.raises(CheckpointError, match=complaint):
        read_lora(path)


@pytest.mark.parametrize("folder", [True, False], ids=["peft", "file"])
def test_pickled_loras_are_read_by_leave(tmp_path: Path, folder: bool) -> None:
    """SDXS' anime adapter is published as a folder of peft's with `adapter_model.bin`."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    tensors = update("base_model.model.conv_in", (8, 4, 3, 3), "lora_A", "lora_B")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    lora = read_lora(tmp_path if folder else tmp_path / "adapter_model.bin", allow_pickle=True)
    expected = weights.load("conv_in.weight") + (2 if folder else 1)
    torch.testing.assert_close(fuse(weights, [(lora, 1.0)], "unet").load("conv_in.weight"), expected)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 99_999])
def test_a_damaged_configuration_in_a_header_is_refused(tmp_path: Path, text: str) -> None:
    path = write_lora(update("unet.conv_in", (8, 4)), tmp_path / "x.safetensors", lora_adapter_metadata=text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: lora_adapter_metadata: (not JSON|content, got 'list')"):
        read_lora(path)
