"""Whether a bundle holds the random weights that presets are exported with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.onnx_files import stored_weights

# How far presets' biases and norms' weights are from 0, 1 or a half (see `export.random_weights`), rounded to fp16.
_REACH = 3**0.5 * 0.02 + 1e-3
_CENTRES = (0.0, 1.0, 0.5)
_FEWEST, _LEAST_LENGTH = 8, 8


def has_random_weights(bundle: Bundle) -> bool:
    """Whether a denoiser's weights are those of no training: every bias and norm lies as a preset's do.

    The graphs tell, whoever exported them and when; of a trained model most of them lie elsewhere.
    """
    return any(untrained(bundle.model_path(name)) for name in bundle.manifest.names("denoiser"))


def untrained(model: Path) -> bool:
    """Whether all vectors of a graph's weights, besides constants and short ones, lie as a preset's do.

    Raises:
        BundleError: as `stored_weights`.
    """
    found = 0
    for weight in stored_weights(model).values():
        if len(weight.shape) != 1 or weight.shape[0] < _LEAST_LENGTH or weight.dtype not in ("float32", "float16"):
            continue
        file = model.parent / weight.file if weight.file else model
        values = np.fromfile(file, weight.dtype, count=weight.shape[0], offset=weight.offset).astype(np.float32)
        if values.min() == values.max():
            continue
        if min(float(np.abs(values - centre).max()) for centre in _CENTRES) > _REACH:
            return False
        found += 1
    return found >= _FEWEST
