"""The small checkpoint with ControlNets, as such are published: with scripts beside them that nothing asks for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import Added, ExportPlan

from .mini import unet, write_checkpoint

# A script that leaves a file when it is run; two of the names are those that diffusers and transformers look for.
STRIKE = "from pathlib import Path\nPath(__file__).with_name('struck').touch()\n"
SCRIPTS = ("pipeline.py", "diffusers.py", "transformers.py", "train.py")

CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    # Two widths halve a picture once, as the small checkpoint's autoencoder does.
    "conditioning_embedding_out_channels": (4, 8),
}


def write_controlnet(folder: Path, **changes: Any) -> Path:
    """A ControlNet of random weights, those that training starts at zero included."""
    torch.manual_seed(3)
    controlnet = ControlNetModel(**{**CONFIG, **changes})
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    controlnet.save_pretrained(folder)
    return folder


def write_steered(folder: Path) -> None:
    """Into a folder: `published` with scripts, ControlNets `edges` and `depth` so too, and the `bundle` of them.

    There is a denoiser in it that the ControlNets do not fit. `checkpoint` is the one published, without scripts.
    """
    write_checkpoint(folder / "checkpoint")
    published = Path(shutil.copytree(folder / "checkpoint", folder / "published"))
    torch.manual_seed(5)
    UNet2DConditionModel.from_config({**unet().config, "layers_per_block": 2}).save_pretrained(folder / "other")
    controlnets = [write_controlnet(folder / name) for name in ("edges", "depth")]
    parts = (published / name for name in ("unet", "vae", "text_encoder", "tokenizer"))
    for holder in (published, *parts, *controlnets):
        for name in SCRIPTS:
            (holder / name).write_text(STRIKE)
    added = [Added(f"controlnet_{one.name}", one) for one in controlnets]
    export_bundle(ExportPlan(published, folder / "bundle", (Added("unet_other", folder / "other"), *added)))
