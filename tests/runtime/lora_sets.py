"""Sets of LoRAs for the denoiser of the tiny bundle."""

from __future__ import annotations

import numpy as np

from tandemrt.runtime.lora_slots import Adapter, LowRank
from tandemrt.runtime.refits import Loras


def loras(name: str, scale: float = 1.0) -> Loras:
    change = LowRank(np.ones((1, 8), np.float32), np.ones((8, 1), np.float32))
    return {"unet": (Adapter(name, {"matmul_1": change}, scale),)}


NONE: Loras = {}
A, B, C = (loras(name) for name in "abc")
