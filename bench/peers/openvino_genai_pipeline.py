"""OpenVINO GenAI's text-to-image pipeline, on the bundle's graphs as OpenVINO's own files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from wire import Clock, Painter, imported, serve, threads_told

_SCHEDULERS = ("DDIM", "EulerAncestralDiscrete", "EulerDiscrete", "FlowMatchEulerDiscrete", "LCM", "PNDM")


class GenAI(Painter):
    """The job's bundle, converted once into the cache. It is given the noise that everybody else has of the seed."""

    packages = ("openvino-genai", "openvino", "openvino-tokenizers")

    def __init__(self, job: Mapping[str, Any]) -> None:
        import openvino_genai  # noqa: PLC0415

        imported()
        began = time.perf_counter()
        bundle = Path(job["bundle"])
        folder = converted(bundle, Path(job["cache"]))
        self.prepared_s = time.perf_counter() - began
        self._job = job
        _, self._otherwise = scheduler_config(bundle)
        settings = {"INFERENCE_PRECISION_HINT": job["precision"]}
        if job["threads"] is not None:
            settings["INFERENCE_NUM_THREADS"] = job["threads"]
        self._pipe = openvino_genai.Text2ImagePipeline(folder, "CPU", **settings)

    def setting(self) -> Mapping[str, str]:
        threads = threads_told(self._job["threads"], "OpenVINO")
        told = {"threads": threads, "precision": self._job["precision"], "device": "cpu"}
        return {**told, "models": "files converted from the graphs beforehand, uncounted", "otherwise": self._otherwise}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        job = self._job
        made = self._pipe.generate(
            f"{job['prompt']} {seed}",
            num_inference_steps=sum(count for _, count in job["steps"]),
            guidance_scale=job["guidance_scale"],
            height=job["height"],
            width=job["width"],
            num_images_per_prompt=job["pictures"],
            generator=seeded(seed),
        )
        return made.data[0] / 255


def seeded(seed: int) -> Any:
    """The generator of a picture: what it draws is what `torch.Generator` draws."""
    import openvino  # noqa: PLC0415
    import openvino_genai  # noqa: PLC0415
    from borrowed import runtime_module  # noqa: PLC0415

    class Torchs(openvino_genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._noise = runtime_module("rng").CpuGenerator(seed)

        def next(self) -> float:
            return float(self._noise.randn((1,))[0])

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(self._noise.randn(tuple(shape)))

    return Torchs()


def scheduler_config(bundle: Path) -> tuple[Mapping[str, Any], str]:
    """The scheduler's configuration as this pipeline reads it, and in words what it is otherwise than the bundle's.

    A solver that it has not got becomes DDIM, which for one step computes the same.
    """
    config = json.loads((bundle / "scheduler" / "scheduler_config.json").read_bytes())
    name = config["_class_name"].removesuffix("Scheduler")
    if name in _SCHEDULERS:
        return config, ""
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset")
    spacing = config.get("timestep_spacing", "linspace")
    last = config.get("final_sigmas_type", "sigma_min" if name == "DEISMultistep" else "zero")
    made = {
        **{key: config[key] for key in kept if key in config},
        "_class_name": "DDIMScheduler",
        # Multistep solvers begin at the last step of the training and end before its first one, as DDIM trails.
        "timestep_spacing": "trailing" if spacing == "linspace" else spacing,
        "set_alpha_to_one": last == "zero",
        "clip_sample": False,
    }
    return made, f"DDIM in place of {name}"


def converted(bundle: Path, cache: Path) -> Path:
    """The bundle's pipeline in OpenVINO's files, made by a process of its own where the cache has it not.

    Raises:
        RuntimeError: it cannot be converted.
    """
    digest = hashlib.sha256((bundle / "tandem.sha256").read_bytes())
    digest.update(f"{metadata.version('openvino')} {metadata.version('openvino-tokenizers')}".encode())
    folder = cache / "peers" / "converted" / digest.hexdigest()[:16]
    if not folder.is_dir():
        making = folder.with_name(f"{folder.name}.{os.getpid()}")
        making.mkdir(parents=True)
        try:
            command = [sys.executable, __file__, str(bundle), str(making)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the bundle cannot be converted: {done.stderr.strip().rpartition(chr(10))[2]}")
            os.replace(making, folder)  # noqa: PTH105 — folders, on one file system
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def convert(bundle: Path, folder: Path) -> None:
    """Write a bundle's pipeline as `optimum-cli export openvino` lays one out."""
    import openvino  # noqa: PLC0415
    import openvino_tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    index = json.loads((bundle / "model_index.json").read_bytes())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "scheduler").mkdir()
    config, _ = scheduler_config(bundle)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae_decoder"):
        if (bundle / name / "model.onnx").is_file():
            (folder / name).mkdir()
            model = with_whole_time_steps(openvino.convert_model(bundle / name / "model.onnx"))
            openvino.save_model(model, folder / name / "openvino_model.xml", compress_to_fp16=False)
            config = with_latents_told(json.loads((bundle / name / "config.json").read_bytes()))
            (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in (name for name in index if name.startswith("tokenizer")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(bundle / name)
        made = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=False)
        openvino.save_model(made, folder / name / "openvino_tokenizer.xml")


def with_latents_told(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tiny decoder's configuration in the words of a large one's, the only ones that are read; others as they are."""
    if config.get("_class_name") != "AutoencoderTiny":
        return config
    return {**config, "_class_name": "AutoencoderKL", "block_out_channels": config["decoder_block_out_channels"]}


def with_whole_time_steps(model: Any) -> Any:
    """A denoiser that is given its time step as whole numbers, as this pipeline gives it; other models as they are."""
    import openvino  # noqa: PLC0415

    if all("timestep" not in one.names for one in model.inputs):
        return model
    changed = openvino.preprocess.PrePostProcessor(model)
    changed.input("timestep").tensor().set_element_type(openvino.Type.i64)
    return changed.build()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        serve(GenAI)
