"""What a component is given when its bundle paints: recorded from a short generation on ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backends.base import Array
from ..runtime.bundle import Bundle
from ..runtime.errors import ExecutionError
from ..runtime.pipeline import Pipeline
from ..runtime.targets import Target
from ..runtime.tensors import CONTROLNET_PREFIX, TAKEN, latent_names, spec_of

PROMPT = "a red circle left of a blue square on a white background"
SEED = 0
_HERE = Target("onnxruntime", "cpu")
_STEPS = 2  # the second sees a latent that a model has worked on


def recorded_inputs(bundle: Bundle, name: str, size: tuple[int, int]) -> dict[str, Array]:
    """The inputs of component `name` in a generation of one picture: a denoiser's at its second step, if it has one.

    size: of the picture, (width, height) in pixels.

    Raises:
        RequestError: the bundle cannot paint such a picture.
        ExecutionError: another component failed before.
    """
    component = bundle.component(name)
    calls = 1
    if component.role in ("denoiser", "controlnet"):
        calls = min(_STEPS, bundle.manifest.defaults.num_inference_steps)
    given: dict[str, Array] = {}
    runs = count(1)

    def record(running: str, inputs: Mapping[str, Array]) -> None:
        if running == name:
            given.update({key: array.copy() for key, array in inputs.items()})
            if next(runs) == calls:
                raise _RecordedError

    # In an empty cache: step engines would run in the component's place, and engines may be what is in doubt.
    with (
        tempfile.TemporaryDirectory(prefix="tandemrt-") as cache,
        Pipeline(bundle, _HERE, None, Path(cache), record) as pipeline,
    ):
        try:
            pipeline(PROMPT, seed=SEED, width=size[0], height=size[1], **_request(bundle, name, size))
        except _RecordedError:
            pass
        except ExecutionError:
            if not given:  # what failed is the component itself, as it may
                raise
    if not given:
        raise ExecutionError(name, "a generation does not run it", remedy="Check the bundle with `tandemrt verify`.")
    return given


def _request(bundle: Bundle, name: str, size: tuple[int, int]) -> dict[str, Any]:
    """What makes a generation run the component."""
    manifest, component = bundle.manifest, bundle.component(name)
    steps = min(_STEPS, manifest.defaults.num_inference_steps)
    request: dict[str, Any] = {"guidance_scale": 1.0}  # one row a call, half the memory
    if component.role == "vae_decoder":
        return {**request, "num_inference_steps": steps, "decoder": name}
    denoiser = manifest.names("denoiser")[0]
    if component.role == "denoiser":
        denoiser = name
    elif component.role == "controlnet":
        denoisers = manifest.names("denoiser")
        denoiser = next((one for one in denoisers if spec_of(bundle.component(one).inputs, TAKEN.mid)), denoiser)
        request["control_image"] = {name.removeprefix(CONTROLNET_PREFIX): _picture(size)}
    inputs = bundle.component(denoiser).inputs
    latent = spec_of(inputs, latent_names(inputs).sample)
    repaints = latent is not None and latent.shape[1] != manifest.latent.channels
    if repaints or component.role == "vae_encoder":
        request["image"] = _picture(size)
    if repaints:
        request["mask_image"] = _picture(size)[..., 0].round()
    return {**request, "steps": {denoiser: steps}}


def _picture(size: tuple[int, int]) -> Array:
    """A disc on a slope of colours, (height, width, 3) float32 in [0, 1]."""
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
    slope = np.stack([x, y, -x]) / 4 + 0.5
    disc = np.array([0.9, 0.1, 0.1])[:, None, None]
    picture: Array = np.where(x**2 + y**2 < 0.3, disc, slope).transpose(1, 2, 0).astype(np.float32)
    return picture


class _RecordedError(Exception):
    """The call that was to be recorded is about to run: nothing after it is needed."""
