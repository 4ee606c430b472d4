"""Runs every line of the README's table of models, on random weights at tiny scale under the models' published names.

`python tests/interop/published_models.py FOLDER [WORD]`: only the lines that hold WORD, where one is given. Takes about
half an hour on two cores; not collected by pytest.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tandemrt.export.presets import read_preset
from tandemrt.export.random_checkpoint import write_checkpoint

README = Path(__file__).resolve().parents[2] / "README.md"
STATE = "diffusion_pytorch_model.safetensors"
# What the table calls a model, where its weights come from: a preset's checkpoint, or one of its further models.
PUBLISHED: dict[str, tuple[str, str | None]] = {
    "stable-diffusion-v1-5": ("sd15", None),
    "stable-diffusion-v1-4": ("sd14", None),
    "bk-sdm-tiny": ("bk-sdm-tiny", None),
    "hybrid-sd-224m": ("hybrid-sd", "unet_small"),
    "hybrid-sd-tinyvae": ("hybrid-sd", "vae_decoder_tiny"),
    "hybrid-sd-small-vae": ("hybrid-sd", "vae_decoder_small"),
    "hybrid-sd-v1-4-lcm": ("hybrid-sd-lcm", None),
    "hybrid-sd-v1-4-lcm-224": ("hybrid-sd-lcm", "unet_small"),
    "stable-diffusion-xl-base-1.0": ("sdxl", None),
    "koala-700m": ("hybrid-sdxl", "unet_small"),
    "hybrid-sd-tinyvae-xl": ("hybrid-sdxl", "vae_decoder_tiny"),
    "hybrid-sd-small-vae-xl": ("hybrid-sdxl", "vae_decoder_small"),
    "sdxs-512-0.9": ("sdxs-512-0.9", None),
    "sdxs-512-dreamshaper": ("sdxs-512-dreamshaper", None),
    "sdxs-512-dreamshaper-sketch": ("sdxs-512-sketch", "controlnet_sketch"),
    "stable-diffusion-3-medium-diffusers": ("sd3-medium", None),
    "control_v11p_sd15_canny": ("sd15-controlnet", "controlnet_canny"),
}
# LoRAs by the checkpoint that they are for.
LORAS = {
    "Hyper-SD15": "stable-diffusion-v1-5",
    "Hyper-SDXL": "stable-diffusion-xl-base-1.0",
    "Hyper-SD3": "stable-diffusion-3-medium-diffusers",
}


def main(folder: Path, word: str) -> None:
    """Run the lines; the first that fails ends the program."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sketch.png", "edges.png", "photo.png", "mask.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for model, export, generate in lines():
        if word.lower() not in (model + export).lower():
            continue
        for name in shlex.split(export):
            provide(folder, re.sub(r"^[a-z_]+=|:[0-9.]+$", "", name))
        began = time.perf_counter()
        shutil.rmtree(folder / "bundle", ignore_errors=True)
        run(folder, ["export", *shlex.split(export)])
        exported = time.perf_counter()
        run(folder, ["generate", "bundle", "--prompt", "a red cat", "--seed", "7", "--force", *shlex.split(generate)])
        print(f"{model}: export {exported - began:.0f} s, picture {time.perf_counter() - exported:.0f} s", flush=True)


def lines() -> Iterator[tuple[str, str, str]]:
    """Model, export's arguments and generate's, line by line of the README's table."""
    table = README.read_text(encoding="utf-8").partition("## The models of the field")[2].partition("\n## ")[0]
    for line in table.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| ") and not cells[0].startswith("Model"):
            yield cells[0], cells[1], cells[2]


def run(folder: Path, arguments: list[str]) -> None:
    """One command of the program, in the folder that holds the models."""
    subprocess.run([sys.executable, "-m", "tandemrt.runtime.cli", *arguments], cwd=folder, check=True)


def provide(folder: Path, name: str) -> None:
    """Put a model of random weights where the table expects it, unless it is there or is no model's name."""
    target = folder / name
    if target.exists() or name == "bundle":
        return
    if name in PUBLISHED:
        preset, component = PUBLISHED[name]
        scratch = folder / f".{name}"
        added = write_checkpoint(read_preset(preset), scratch, "tiny")
        (added[component] if component else scratch / "checkpoint").rename(target)
        shutil.rmtree(scratch)
        if name.endswith("-sketch"):  # published as .bin alone
            torch.save(load_file(target / STATE), target / "diffusion_pytorch_model.bin")
            (target / STATE).unlink()
    elif name.endswith("-Unet.safetensors"):
        provide(folder, LORAS["Hyper-SDXL"])
        shutil.copy(folder / LORAS["Hyper-SDXL"] / "unet" / STATE, target)
    elif name.startswith("Hyper-SD3-"):
        write_lora(folder, target, LORAS["Hyper-SD3"], "transformer", lambda module: f"transformer.{module}.lora_{{}}")
    elif name.startswith("Hyper-"):
        base = LORAS["-".join(name.split("-")[:2])]
        write_lora(folder, target, base, "unet", lambda module: f"lora_unet_{module.replace('.', '_')}.lora_{{}}")
    elif name.endswith("-anime"):
        provide(folder, "sdxs-512-dreamshaper")
        target.mkdir()
        (target / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
        adapter = target / "adapter.safetensors"
        write_lora(
            folder, adapter, "sdxs-512-dreamshaper", "unet", lambda module: f"base_model.model.{module}.lora_{{}}"
        )
        torch.save(load_file(adapter), target / "adapter_model.bin")
        adapter.unlink()


def write_lora(folder: Path, file: Path, base: str, part: str, key: Callable[[str], str]) -> None:
    """A LoRA of rank 4 for the attention of a checkpoint's denoiser, under the names that `key` gives."""
    provide(folder, base)
    kohya = "lora_unet" in key("")
    ends = ("down.weight", "up.weight") if kohya else ("A.weight", "B.weight")
    tensors = {}
    for name, weight in load_file(folder / base / part / STATE).items():
        module = name.removesuffix(".weight")
        if module.endswith(("to_q", "to_v")) and name.endswith(".weight"):
            tensors[key(module).format(ends[0])] = torch.randn(4, weight.shape[1]) * 0.1
            tensors[key(module).format(ends[1])] = torch.randn(weight.shape[0], 4) * 0.1
            if kohya:
                tensors[key(module).replace("lora_{}", "alpha")] = torch.tensor(4.0)
    save_file(tensors, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
