"""The trained family as it is published: fp16 safetensors in diffusers layout, the training log beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tandemrt.runtime import ArgumentError

from . import family

LOG = "training-log.jsonl"
# Where each stage's modules go: the prefix of their names in the stage's file, the folder.
FOLDERS = {
    "vae_tiny": {"": "vae_tiny"},
    "large": {"unet.": "large/unet", "text_encoder.": "large/text_encoder"},
    "small": {"": "small/unet"},
    "one_step": {"": "one_step/unet"},
    "vae_kl": {"": "large/vae"},
    "vae_small": {"": "vae_small"},
}


class Trained(Protocol):
    """Finished stages: `work` holds their files, the tokenizer and the log."""

    work: Path
    tokenizer: CLIPTokenizer

    def load(self, stage: str, module: nn.Module, prefix: str = "") -> nn.Module:
        """Fill `module` with a stage's weights."""


def require_family(out: Path) -> None:
    """Check that a family may be put at `out`; the one that a killed publishing has moved aside is put back first.

    Raises:
        ArgumentError: `out` exists and holds something else.
    """
    old = _aside(out)
    if old.exists() and not out.exists():
        old.rename(out)
    if out.exists() and not (out / LOG).is_file():
        raise ArgumentError("--out", "exists and is no trained family", got=str(out), remedy="Give another folder.")


def read_published(stage: str, published: Path) -> dict[str, Tensor]:
    """A stage's weights in float32, by their names in the stage's file.

    Raises:
        ArgumentError: there are none.
    """
    tensors = {
        f"{prefix}{name}": tensor.float() if tensor.is_floating_point() else tensor
        for prefix, folder in FOLDERS[stage].items()
        for file in (published / folder).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    if not tensors:
        raise ArgumentError("--out", f"no published weights of {stage}", got=str(published), remedy="Train it too.")
    return tensors


def read_log(stage: str, published: Path) -> list[dict[str, object]]:
    """What was logged while a stage was trained."""
    entries = map(json.loads, (published / LOG).read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if entry["stage"] == stage]


def publish(trained: Trained, out: Path) -> None:
    """Write the family to `out`, which appears whole.

    Raises:
        ArgumentError: `out` exists and holds something else.
    """
    require_family(out)
    part, old = out.with_name(out.name + ".part"), _aside(out)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    modules = {
        "large/unet": family.large_unet(),
        "large/text_encoder": family.text_encoder(trained.tokenizer),
        "large/vae": family.kl_vae(),
        "small/unet": family.pruned_unet(family.SMALL_PRUNING),
        "one_step/unet": family.pruned_unet(family.ONE_STEP_PRUNING),
        "vae_small": family.small_vae(),
        "vae_tiny": family.tiny_vae(),
    }
    for stage, folders in FOLDERS.items():
        for prefix, folder in folders.items():
            trained.load(stage, modules[folder], prefix).half().save_pretrained(part / folder)
    shutil.copytree(trained.work / "tokenizer", part / "large" / "tokenizer")
    family.scheduler().save_pretrained(part / "large" / "scheduler")
    family.one_step_scheduler().save_pretrained(part / "one_step" / "scheduler")
    (part / "large" / "model_index.json").write_text(json.dumps(_model_index(), indent=2) + "\n", encoding="utf-8")
    shutil.copy(trained.work / LOG, part)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _aside(out: Path) -> Path:
    """Where a family is moved while another takes its place."""
    return out.with_name(out.name + ".old")


def _model_index() -> dict[str, object]:
    """What diffusers reads to assemble the large model's pipeline."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
