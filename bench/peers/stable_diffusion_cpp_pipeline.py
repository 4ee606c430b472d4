"""stable-diffusion.cpp on the checkpoint that a bundle was made of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from borrowed import runtime_module
from wire import Clock, Painter, imported, serve

# Its name of what a class of diffusers does.
_METHODS = {
    "EulerDiscrete": "euler",
    "EulerAncestralDiscrete": "euler_a",
    "HeunDiscrete": "heun",
    "DPMSolverMultistep": "dpm++2m",
    "LCM": "lcm",
}
# Its own tokenizer knows these numbers alone.
_CLIP = {"<|startoftext|>": 49406, "cat</w>": 2368}
_TOKENS = 49408
# Its text encoders' layers by their width.
_LAYERS = {768: 12, 1024: 24}


class StableDiffusionCpp(Painter):
    """The job's checkpoint, a folder, which it reads as it is. Its noise is its copy of PyTorch's."""

    packages = ("stable-diffusion-cpp-python",)

    def __init__(self, job: Mapping[str, Any]) -> None:
        from stable_diffusion_cpp import StableDiffusion  # noqa: PLC0415

        imported()
        checkpoint = Path(job["checkpoint"])
        require_known(checkpoint)
        self._job, self._threads = job, job["threads"] or len(os.sched_getaffinity(0))
        count = sum(each for _, each in job["steps"])
        self._method, self._sigmas, self._otherwise = sampling(checkpoint, count)
        self._clip_skip = clip_skip(checkpoint)
        self._weights = weights_type(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
        self._model = StableDiffusion(
            model_path=str(checkpoint),
            taesd_path=tiny_decoder(checkpoint),
            vae_decode_only=True,
            n_threads=self._threads,
            rng_type="cpu",
            sampler_rng_type="cpu",
            prediction="v" if scheduler_config(checkpoint)["prediction_type"] == "v_prediction" else "eps",
            verbose=False,
        )

    def setting(self) -> Mapping[str, str]:
        # It keeps the checkpoint's types, but for convolutions.
        precision = "weights F16" if self._weights == "F16" else f"weights {self._weights}, of convolutions F16"
        told = {"threads": str(self._threads), "precision": precision, "device": "cpu"}
        return {**told, "otherwise": self._otherwise}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        import numpy as np  # noqa: PLC0415

        job = self._job
        pictures = self._model.generate_image(
            prompt=f"{job['prompt']} {seed}",
            clip_skip=self._clip_skip,
            cfg_scale=max(1.0, job["guidance_scale"]),
            sample_method=self._method,
            sigmas=",".join(map(str, self._sigmas)),
            sample_steps=len(self._sigmas) - 1,
            width=job["width"],
            height=job["height"],
            seed=seed,
            batch_count=job["pictures"],
        )
        return np.asarray(pictures[0].convert("RGB"), np.float32) / 255


def require_known(checkpoint: Path) -> None:
    """Raise ValueError for a checkpoint without a UNet, of other widths, or with a vocabulary of another size."""
    if not (checkpoint / "unet").is_dir():
        raise ValueError("is given checkpoints with a UNet, and this one has none")
    width = _config(checkpoint / "unet")["block_out_channels"][0]
    if width != 320:
        raise ValueError(f"knows UNets of Stable Diffusion's width, 320; this one begins with {width}")
    tokens = len(_vocabulary(checkpoint))
    if tokens != _TOKENS:
        raise ValueError(f"has CLIP's vocabulary built in, of {_TOKENS} tokens; this checkpoint has one of {tokens}")


def sampling(checkpoint: Path, steps: int) -> tuple[str, Sequence[float], str]:
    """Its sampler, the noise levels of the checkpoint's own time steps, and what is otherwise than asked."""
    import numpy as np  # noqa: PLC0415

    config = scheduler_config(checkpoint)
    name = config["_class_name"].removesuffix("Scheduler")
    method = _METHODS.get(name)
    if name == "DPMSolverMultistep" and (config["algorithm_type"], config["solver_order"]) != ("dpmsolver++", 2):
        method = None
    timesteps = runtime_module("solvers").compile_table(config["_class_name"], config, steps).timesteps
    schedule = runtime_module("schedule")
    levels = schedule.sigmas_from_alphas_cumprod(schedule.training_alphas_cumprod(config))
    # Solvers that call the model twice at a time step name it twice.
    sigmas = np.interp(np.unique(timesteps)[::-1], np.arange(len(levels)), levels)
    told = [f"Euler in place of {name}"] if method is None and steps > 1 else []
    if np.any(_config(checkpoint / "unet").get("only_cross_attention")):
        # As of SDXS-512-0.9. In their place it attends to the image, with all heads in one: more work, another picture.
        told.append("attention to the image where the UNet's is to the text alone")
    if any(_vocabulary(checkpoint).get(token) != number for token, number in _CLIP.items()):
        told.append("CLIP's vocabulary in place of the checkpoint's")
    return method or "euler", (*sigmas.tolist(), 0.0), ", ".join(told)


def clip_skip(checkpoint: Path) -> int:
    """Which of its text encoder's layers is the checkpoint's last one, counted from the end; -1 stands for its own."""
    if (checkpoint / "text_encoder_2").is_dir():
        return -1
    text = _config(checkpoint / "text_encoder")
    return 1 + _LAYERS[text["hidden_size"]] - int(text["num_hidden_layers"])


def scheduler_config(checkpoint: Path) -> Mapping[str, Any]:
    """The checkpoint's scheduler with everything that its class has a default for."""
    given = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_bytes())
    effective = runtime_module("solvers.config").effective_config(given["_class_name"], given)
    return {**effective, "_class_name": given["_class_name"]}


def weights_type(file: Path) -> str:
    """The type of the first tensor in a file of safetensors."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return next(str(one["dtype"]) for name, one in header.items() if name != "__metadata__")


def tiny_decoder(checkpoint: Path) -> str:
    """The file of a checkpoint's decoder where that is a tiny one, which has a way in of its own; otherwise empty."""
    if _config(checkpoint / "vae")["_class_name"] != "AutoencoderTiny":
        return ""
    return str(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")


def _vocabulary(checkpoint: Path) -> Mapping[str, int]:
    numbers: Mapping[str, int] = json.loads((checkpoint / "tokenizer" / "vocab.json").read_bytes())
    return numbers


def _config(folder: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config


if __name__ == "__main__":
    serve(StableDiffusionCpp)
