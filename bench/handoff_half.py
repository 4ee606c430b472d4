"""What float16 changes: how far states, latents and pictures are from those that were handed over in float32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from tandemrt.runtime import Cloud, Pipeline
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.plan import Schedule, compile_plan

from .figures import cell, markdown_table, spread
from .rounds import psnr_db

DTYPES = ("float32", "float16")
SERVER_STEPS, OWN_STEPS = 10, 15
# As long as a server lets a request run.
_SECONDS = 600.0
_TOLD = {
    "state": "the state handed over",
    "latents": "the latents at the end",
    "pictures": "the pictures",
}


def half_figures(pipe: Pipeline, url: str, prompt: str, size: int, pictures: int) -> dict[str, Any]:
    """PSNR in decibels of what was handed over in float16, to what was in float32, from the same seeds.

    The server runs the first steps, with the bundle's largest denoiser; this process the rest, with its smallest.

    Raises:
        CloudError: the server failed.
        TandemError: as a call of the pipeline.
    """
    steps = split_steps(pipe.bundle.manifest)
    asked = {"prompt": prompt, "height": size, "width": size}
    plan = compile_plan(pipe.bundle.manifest, Schedule(steps=steps)).digest
    told: dict[str, list[float]] = {name: [] for name in _TOLD}
    sizes: dict[str, int] = {}
    for seed in range(pictures):
        made: dict[str, tuple[npt.NDArray[np.float32], ...]] = {}
        for dtype in DTYPES:
            there = {**asked, "steps": [list(pair) for pair in steps], "seed": seed, "until": SERVER_STEPS}
            with closing(Cloud(url, seconds=_SECONDS, half=dtype == "float16")) as cloud:
                handover, timing = cloud.run(there, {}, plan)
            output = pipe(**asked, steps=steps, start=handover, output_type="np")
            made[dtype] = (handover.state, output.latents, np.stack(output.images))
            sizes[dtype] = timing.received_bytes
        for name, values, reference in zip(_TOLD, made["float16"], made["float32"], strict=True):
            told[name].append(psnr_db(values, reference) if name == "pictures" else latent_psnr_db(values, reference))
    return {
        "steps": [list(pair) for pair in steps],
        "until": SERVER_STEPS,
        "pictures": pictures,
        "received_bytes": sizes,
        "psnr_db": {name: spread(samples) for name, samples in told.items()},
    }


def split_steps(manifest: Manifest) -> tuple[tuple[str, int], ...]:
    """The plan that is handed over: the largest denoiser's steps, then the smallest's; all of one's, where one is."""
    by_size = sorted(manifest.names("denoiser"), key=lambda name: manifest.components[name].parameters)
    if len(by_size) == 1:
        return ((by_size[0], SERVER_STEPS + OWN_STEPS),)
    return ((by_size[-1], SERVER_STEPS), (by_size[0], OWN_STEPS))


def latent_psnr_db(values: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Of latents, whose peak is the reference's range, from its least to its largest value."""
    range_ = np.ptp(reference)
    return psnr_db(values / range_, reference / range_)


def half_markdown(half: Mapping[str, Any]) -> str:
    """The figures as Markdown: medians with the 10th to 90th percentile."""
    heads = ("handed over in float16, dB of PSNR to float32", "median", "least")
    rows = [
        [told, cell(half["psnr_db"][name], 1), f"{half['psnr_db'][name]['minimum']:.1f}"]
        for name, told in _TOLD.items()
    ]
    steps = ", ".join(f"{name} {count}" for name, count in half["steps"])
    sizes = half["received_bytes"]
    note = (
        f"{half['pictures']} pictures of {steps} steps, handed over after {half['until']}: the answer has "
        f"{sizes['float16']:,} bytes in float16, {sizes['float32']:,} in float32. Of latents the peak is their range."
    )
    return f"{markdown_table(heads, rows)}\n{note}\n"
