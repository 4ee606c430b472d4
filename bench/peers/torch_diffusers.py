"""diffusers' own pipeline on the checkpoint a bundle was made of, eager or with torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wire import Clock, Painter, imported, serve


class Diffusers(Painter):
    """The job's checkpoint, with further denoisers for a plan of several, in the job's dtype."""

    packages = ("diffusers", "transformers", "torch")

    def __init__(self, job: Mapping[str, Any]) -> None:
        if job["compile"]:
            self._compiled = compiling_afresh()
        import diffusers  # noqa: PLC0415
        import torch  # noqa: PLC0415
        from diffusers import DiffusionPipeline  # noqa: PLC0415

        imported()
        self._torch, self._job, self._clock = torch, job, Clock()
        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        dtype = getattr(torch, job["dtype"])
        pipe = DiffusionPipeline.from_pretrained(job["checkpoint"], torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        self._main = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
        self._denoisers = {self._main: getattr(pipe, self._main)}
        kind = type(self._denoisers[self._main])
        for name in dict.fromkeys(name for name, _ in job["steps"]):
            if name != self._main:
                self._denoisers[name] = loaded(kind, model_folder(job["added"][name], self._main), dtype)
        if job["decoder"] is not None:
            folder = model_folder(job["decoder"], "vae")
            config = (folder / "config.json").read_text(encoding="utf-8")
            vae = "AutoencoderTiny" if "AutoencoderTiny" in config else "AutoencoderKL"
            pipe.vae = getattr(diffusers, vae).from_pretrained(folder, torch_dtype=dtype)
        for module in (pipe, *self._denoisers.values()):
            module.to(job["device"])
        if job["compile"]:
            # What takes the time stays outside: what is compiled must not see the clock.
            for module in (*self._denoisers.values(), pipe.vae.decoder):
                module.forward = torch.compile(module.forward)
        self._pipe = pipe
        if job["device"] == "cpu":  # a GPU works on when a part returns, and waiting there would cost time
            self._time_parts()
        self._by_step = [name for name, count in job["steps"] for _ in range(count)]

    def setting(self) -> Mapping[str, str]:
        threads, device = str(self._torch.get_num_threads()), self._pipe.device
        return {"threads": threads, "precision": precision_told(self._job["dtype"], device), "device": str(device)}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        self._clock = clock
        setattr(self._pipe, self._main, self._denoisers[self._by_step[0]])
        made = self._pipe(
            f"{self._job['prompt']} {seed}",
            num_inference_steps=len(self._by_step),
            guidance_scale=self._job["guidance_scale"],
            height=self._job["height"],
            width=self._job["width"],
            num_images_per_prompt=self._job["pictures"],
            generator=self._torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            **({"callback_on_step_end": self._hand_over} if len(self._denoisers) > 1 else {}),
        )
        return made.images[0]

    def _hand_over(self, pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Have the next step run on its denoiser."""
        if step + 1 < len(self._by_step):
            setattr(pipe, self._main, self._denoisers[self._by_step[step + 1]])
        return given

    def _time_parts(self) -> None:
        for name, module in self._denoisers.items():
            module.forward = self._timed(f"{name}_s", module.forward)
        self._pipe.encode_prompt = self._timed("text_s", self._pipe.encode_prompt)
        self._pipe.vae.decode = self._timed("decode_s", self._pipe.vae.decode)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self._clock.part(name):
                return function(*arguments, **named)

        return timed


def precision_told(dtype: str, device: Any) -> str:
    """A dtype in words; on a GPU PyTorch computes convolutions of float32 in TF32, unless it is told not to."""
    import torch  # noqa: PLC0415

    tf32 = dtype == "float32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return f"{dtype}, convolutions in TF32" if tf32 else dtype


def compiling_afresh() -> TemporaryDirectory[str]:
    """Have torch.compile keep its code in a folder that goes with the process, so that each start compiles.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"torch.compile needs a C++ compiler, and {compiler} is not there; CXX names another")
    folder = TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    return folder


def loaded(kind: Any, folder: Path, dtype: Any) -> Any:
    """A further denoiser; one whose inner widths its configuration does not tell, as a pruned one's, by its tensors."""
    from safetensors.torch import load_file  # noqa: PLC0415

    from tandemrt.export.pruned import resize_inner_widths  # noqa: PLC0415

    files = sorted(folder.glob("*.safetensors"))
    if kind.__name__ != "UNet2DConditionModel" or len(files) != 1:
        return kind.from_pretrained(folder, torch_dtype=dtype)
    tensors, module = load_file(files[0]), kind.from_config(kind.load_config(folder))
    resize_inner_widths(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    module.load_state_dict(tensors)
    return module.to(dtype).eval()


def model_folder(source: str, part: str) -> Path:
    """Where a model lies: in the folder that is named, or in its part of a pipeline's.

    Raises:
        FileNotFoundError: in neither; what is no folder would be taken for a name on a hub.
    """
    folder = Path(source)
    for each in (folder, folder / part):
        if (each / "config.json").is_file():
            return each
    raise FileNotFoundError(f"{folder} holds no model: neither it nor {part} in it has a config.json")


if __name__ == "__main__":
    serve(Diffusers)
