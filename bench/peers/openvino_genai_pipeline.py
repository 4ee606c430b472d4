"""OpenVINO GenAI's text-to-image pipeline, on the bundle's graphs as OpenVINO's own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wire import Clock, Painter, serve


class GenAI(Painter):
    """The job's bundle, converted when it is opened. Noise is its own torch-like generator's, from the seed."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import openvino_genai  # noqa: PLC0415

        self._genai, self._job = openvino_genai, job
        settings = {} if job["threads"] is None else {"INFERENCE_NUM_THREADS": job["threads"]}
        if job["precision"] is not None:
            settings["INFERENCE_PRECISION_HINT"] = job["precision"]
        self._folder = TemporaryDirectory()
        converted(Path(job["bundle"]), Path(self._folder.name))
        self._pipe = openvino_genai.Text2ImagePipeline(self._folder.name, "CPU", **settings)

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        job = self._job
        made = self._pipe.generate(
            f"{job['prompt']} {seed}",
            num_inference_steps=sum(count for _, count in job["steps"]),
            guidance_scale=job["guidance_scale"],
            height=job["height"],
            width=job["width"],
            generator=self._genai.CppStdGenerator(seed),
        )
        return made.data[0] / 255


def converted(bundle: Path, folder: Path) -> None:
    """Write a bundle's pipeline as `optimum-cli export openvino` lays one out."""
    import openvino  # noqa: PLC0415
    import openvino_tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    index = json.loads((bundle / "model_index.json").read_bytes())
    shutil.copy(bundle / "model_index.json", folder)
    shutil.copytree(bundle / "scheduler", folder / "scheduler")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae_decoder"):
        if (bundle / name / "model.onnx").is_file():
            (folder / name).mkdir()
            model = with_whole_time_steps(openvino.convert_model(bundle / name / "model.onnx"))
            openvino.save_model(model, folder / name / "openvino_model.xml", compress_to_fp16=False)
            shutil.copy(bundle / name / "config.json", folder / name)
    for name in (name for name in index if name.startswith("tokenizer")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(bundle / name)
        made = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=False)
        openvino.save_model(made, folder / name / "openvino_tokenizer.xml")


def with_whole_time_steps(model: Any) -> Any:
    """A denoiser that is given its time step as whole numbers, as this pipeline gives it; other models as they are."""
    import openvino  # noqa: PLC0415

    if all("timestep" not in one.names for one in model.inputs):
        return model
    changed = openvino.preprocess.PrePostProcessor(model)
    changed.input("timestep").tensor().set_element_type(openvino.Type.i64)
    return changed.build()


if __name__ == "__main__":
    serve(GenAI)
