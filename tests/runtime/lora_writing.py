"""LoRAs of random numbers for modules of given shapes, in two published layouts, written without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FLAT = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
Shapes = Mapping[str, tuple[int, ...]]


def write_lora(
    path: Path, parts: Mapping[str, Shapes], *, rank: int = 2, seed: int = 0, layout: str = "kohya", size: float = 0.1
) -> Path:
    """An update of every module of each part; `layout`: `kohya`, with alphas of half the rank, or `diffusers`."""
    random = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for part, shapes in parts.items():
        for module, (out, *read) in shapes.items():
            down = size * random.standard_normal((rank, *read))
            up = size * random.standard_normal((out, rank, *(1 for _ in read[1:])))
            name = FLAT[part] + module.replace(".", "_") if layout == "kohya" else f"{part}.{module}"
            halves = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
            tensors |= {f"{name}.{half}.weight": one for half, one in zip(halves, (down, up), strict=True)}
            if layout == "kohya":
                tensors[f"{name}.alpha"] = np.array(rank / 2)
    return write_safetensors(path, tensors)


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    """A safetensors file of float32."""
    header, content = {}, b""
    for name, values in tensors.items():
        raw = values.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [len(content), len(content) + len(raw)],
        }
        content += raw
    described = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(described)) + described + content)
    return path
