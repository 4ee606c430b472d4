"""optimum's ONNX Runtime pipeline, on the bundle itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wire import Clock, Painter, imported, serve, threads_told


class Optimum(Painter):
    """The job's bundle, which optimum reads as it is."""

    packages = ("optimum-onnx", "optimum", "onnxruntime", "diffusers", "transformers", "torch")

    def __init__(self, job: Mapping[str, Any]) -> None:
        import onnxruntime  # noqa: PLC0415
        import torch  # noqa: PLC0415
        from optimum import onnxruntime as optimum  # noqa: PLC0415

        imported()
        options = onnxruntime.SessionOptions()
        if job["threads"] is not None:
            options.intra_op_num_threads = job["threads"]
        kind = json.loads((Path(job["bundle"]) / "model_index.json").read_bytes())["_class_name"].removeprefix("ORT")
        self._torch, self._job = torch, job
        self._pipe = getattr(optimum, f"ORT{kind}").from_pretrained(job["bundle"], session_options=options)
        self._pipe.set_progress_bar_config(disable=True)

    def setting(self) -> Mapping[str, str]:
        threads = threads_told(self._job["threads"], "ONNX Runtime")
        return {"threads": threads, "precision": "the graphs'", "device": "cpu"}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        job = self._job
        made = self._pipe(
            f"{job['prompt']} {seed}",
            num_inference_steps=sum(count for _, count in job["steps"]),
            guidance_scale=job["guidance_scale"],
            height=job["height"],
            width=job["width"],
            num_images_per_prompt=job["pictures"],
            generator=self._torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        )
        return made.images[0]


if __name__ == "__main__":
    serve(Optimum)
