"""Many threads on one pipeline's engines, with LoRAs and without: the pictures of serial runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tandemrt.runtime import Pipeline
from tandemrt.runtime.onnx_files import projections

from ..runtime.lora_writing import write_lora
from ..runtime.test_concurrency import TARGETS, at_once
from .test_loras import build

RANK = 2
PLANS: tuple[dict[str, Any], ...] = (
    {"prompt": "red", "num_inference_steps": 3},
    {"prompt": "blue", "steps": {"unet": 2, "unet_small": 2}},
    {"prompt": "red blue", "num_inference_steps": 3, "guidance_scale": 1.0},
    {"prompt": "blue", "num_inference_steps": 3, "solver": "euler_a"},
)


@pytest.mark.parametrize(("target", "step"), [(TARGETS[0], True), (TARGETS[1], False)], ids=["step engines", "loop"])
def test_threads_with_loras_paint_what_serial_runs_paint(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, step: bool
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    graphs = {name: projections(tiny_path / name / "model.onnx") for name in ("unet", "text_encoder")}
    parts = ({"unet": graphs["unet"]}, graphs)
    files = [write_lora(tmp_path / f"{at}.safetensors", part, rank=RANK, seed=at) for at, part in enumerate(parts)]
    loras = [{}, {files[0]: 0.5}, {files[1]: 1.0}, {files[0]: -1.0, files[1]: 0.5}]
    build(tiny_path, tmp_path, target, ("unet", "text_encoder"), lora_slots=2, lora_rank=RANK)
    if step:
        build(tiny_path, tmp_path, target, ("unet",), lora_slots=2, lora_rank=RANK, step=True)
        build(tiny_path, tmp_path, target, ("unet", "unet_small"), step=True)
    jobs = [{**plan, "loras": wanted, "seed": 7} for plan in PLANS for wanted in loras]

    def latents(pipe: Pipeline, job: dict[str, Any]) -> npt.NDArray[np.float32]:
        return pipe(**job, output_type="latent").latents

    with Pipeline.open(tiny_path, target, threads=1) as pipe:
        serial = [latents(pipe, job) for job in jobs]
    with Pipeline.open(tiny_path, target, threads=1) as pipe:
        together = at_once([lambda job=job: latents(pipe, job) for job in jobs * 2])
    for index, made in enumerate(together):
        np.testing.assert_array_equal(made, serial[index % len(serial)])
    assert len({made.tobytes() for made in serial}) == len(serial)
