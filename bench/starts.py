"""What a fresh interpreter spends on importing and opening: seconds, and memory at its peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .figures import spread

PROMPT = "a red circle left of a blue square on a white background"
STEPS = 25
GUIDANCE_SCALE = 2.0

# The peak stands in /proc: what getrusage reports of a child still holds the parent's size at the fork.
_PRELUDE = """
import json, sys, time

def peak_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

began, bare_mib = time.perf_counter(), peak_mib()
facts = {}

def mark(name):
    facts[name + "_s"], facts[name + "_peak_mib"] = time.perf_counter() - began, peak_mib()
"""
_EPILOGUE = "\nfacts['bare_interpreter_peak_mib'] = bare_mib\nprint(json.dumps(facts))\n"

_IMPORTS = {
    "tandemrt.runtime": "from tandemrt.runtime import Pipeline\nmark('import')",
    "diffusers": "from diffusers import StableDiffusionPipeline\nmark('import')",
}
_OPENINGS = {
    "tandemrt": """
from tandemrt.runtime import Pipeline
mark("import")
with Pipeline.open(sys.argv[1]) as pipe:
    mark("open")
    pipe(sys.argv[2], steps={"unet": int(sys.argv[3])}, guidance_scale=float(sys.argv[4]), seed=0).images[0]
    mark("first_picture")
    pipe(sys.argv[2], steps={"unet": int(sys.argv[3])}, guidance_scale=float(sys.argv[4]), seed=1).images[0]
    mark("second_picture")
""",
    "diffusers": """
import torch
from diffusers import StableDiffusionPipeline
mark("import")
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
mark("open")

def paint(seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": int(sys.argv[3]), "guidance_scale": float(sys.argv[4])}
    return pipe(sys.argv[2], generator=generator, **arguments).images[0]

paint(0)
mark("first_picture")
paint(1)
mark("second_picture")
""",
}


def import_figures(repeats: int) -> list[dict[str, Any]]:
    """Seconds to import the pipeline class and peak memory in MiB then, before a model is opened; taken in turns."""
    runs = _in_turns({name: (code, ()) for name, code in _IMPORTS.items()}, repeats)
    return [{"import": name, **_summed_up(facts)} for name, facts in runs.items()]


def opening_figures(bundle: Path, checkpoint: Path, repeats: int) -> list[dict[str, Any]]:
    """Seconds since the start, and peak memory, after import, opening, the first and the second picture.

    Both load the same weights in fp32 and paint the same prompt in the same steps. This runtime checks every file's
    digest when it opens and loads a model when it is first needed, so the first picture is what to compare.
    """
    request = (PROMPT, str(STEPS), str(GUIDANCE_SCALE))
    programs: dict[str, tuple[str, tuple[str, ...]]] = {
        "tandemrt": (_OPENINGS["tandemrt"], (str(bundle), *request)),
        "diffusers": (_OPENINGS["diffusers"], (str(checkpoint), *request)),
    }
    return [{"runtime": name, **_summed_up(facts)} for name, facts in _in_turns(programs, repeats).items()]


def _in_turns(programs: dict[str, tuple[str, tuple[str, ...]]], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Run the programs one after the other, `repeats` times; a first round that fills the disk cache is not kept."""
    kept: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, (code, arguments) in programs.items():
            facts = run_fresh(code, *arguments)
            if repeat:
                kept[name].append(facts)
    return kept


def run_fresh(code: str, *arguments: str) -> dict[str, float]:
    """Run `code`, which calls `mark(name)`, in a fresh interpreter; returns its marks.

    Raises:
        RuntimeError: the interpreter failed; the message ends as its error output does.
    """
    command = [sys.executable, "-c", _PRELUDE + code + _EPILOGUE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fresh interpreter: exit status {done.returncode}. {done.stderr.strip()[-2000:]}")
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _summed_up(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {name: spread([run[name] for run in runs]) for name in runs[0]}
