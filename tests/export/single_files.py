"""Single files of small models, as the tests of reading them write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from tandemrt.export.checkpoint import Checkpoint, Part
from tandemrt.export.presets import models, read_preset
from tandemrt.export.random_tokenizer import write_tokenizer

from .original import VOCABULARY, State

PRESETS = ("sd15", "sd21", "sdxl", "ssd-1b", "koala-700m", "sd3-medium", "sd3-medium-no-t5")
UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."


def tokenizers(folder: Path, preset: str) -> Path:
    """A pipeline directory's tokenizers, those that the preset's text encoders want."""
    for component, name in read_preset(preset).models.items():
        if component.startswith("text_encoder"):
            path = folder / component.replace("text_encoder", "tokenizer")
            write_tokenizer(path, VOCABULARY, 77, str(models()[name].pad_token))
    return folder


def write(folder: Path, tensors: State) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def parts(checkpoint: Checkpoint) -> dict[str, Part]:
    texts = {name: source.encoder for name, source in checkpoint.texts.items()}
    return {checkpoint.family.denoiser: checkpoint.denoiser, "vae": checkpoint.vae, **texts}


def without(prefix: str) -> Callable[[State], object]:
    return lambda file: [file.pop(name) for name in list(file) if name.startswith(prefix)]
