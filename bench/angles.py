"""What OpenVINO's bf16 does to a denoiser's angles: `python -m tandemrt.bench.angles BUNDLE ... --json FILE`.

A bundle's first denoiser is run on random inputs at the last time step of training: in fp32 by ONNX Runtime, and in
bf16 by OpenVINO, with the angles of its sinusoidal embeddings kept in fp32 (see `runtime/backends/openvino_graph.py`)
and without. Nothing here is timed: the figures do not depend on what else the machine does. The processor needs
instructions for bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.engines.openvino import require_buildable
from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Array
from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.backends.openvino_graph import read_graph
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import parse_target

from .arguments import add_report
from .figures import markdown_table, write_report
from .machine import described, machine_facts
from .program import run_program

SEED, TIMESTEP = 0, 999
REFERENCE = parse_target("onnxruntime:cpu")
_TIME_IDS, _TIMESTEP = "time_ids", "timestep"


def figures_of(path: Path) -> dict[str, Any]:
    """The distance of both bf16 predictions to the fp32 one: root mean square, as a part of the latter's.

    Raises:
        BundleError: the bundle is damaged, foreign or newer than this runtime.
    """
    bundle = Bundle.open(path)
    name = bundle.manifest.names("denoiser")[0]
    (request,) = requests_of(BuildPlan(path, (REFERENCE,), Path(), (name,)), bundle)
    inputs, feeds = request.facts.inputs, feeds_of(request)
    binding = open_session(request.model, REFERENCE).bind({spec.name: feeds[spec.name].shape for spec in inputs})
    for spec in inputs:
        binding.inputs[spec.name][...] = feeds[spec.name]
    binding.run()
    (expected,) = binding.outputs.values()
    core = imported("openvino").Core()
    graphs = {"kept": read_graph(core, request.model, "bf16"), "rounded": core.read_model(request.model)}
    distances = {}
    for label, graph in graphs.items():
        compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        distances[label] = _relative_rms(compiled(feeds)[compiled.output(0)], expected)
    return {"bundle": path.name, "denoiser": name, **distances}


def feeds_of(request: Request) -> dict[str, Array]:
    """Standard normal inputs of the shapes a request is tuned for, at `TIMESTEP`; sizes are the latent's, times 8."""
    random, feeds = np.random.default_rng(SEED), dict[str, Array]()
    for spec in request.facts.inputs:
        shape = request.shapes[spec.name]
        if spec.name == _TIMESTEP:
            values = np.full(shape, TIMESTEP)
        elif spec.name == _TIME_IDS:
            height, width = (8 * side for side in request.shapes["sample"][2:])
            values = np.tile(np.array([height, width, 0, 0, height, width]), (shape[0], 1))
        else:
            values = random.standard_normal(shape)
        feeds[spec.name] = values.astype(spec.dtype)
    return feeds


def _relative_rms(found: Array, expected: Array) -> float:
    difference = np.subtract(found, expected, dtype=np.float64)
    return float(np.sqrt(np.mean(np.square(difference)) / np.mean(np.square(expected, dtype=np.float64))))


def table(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown, with what they were measured on below."""
    heads = ("bundle, denoiser", "angles in fp32", "as OpenVINO has them")
    rows = [
        (f"{one['bundle']} {one['denoiser']}", f"{one['kept']:.2%}", f"{one['rounded']:.2%}")
        for one in facts["figures"]
    ]
    told = (
        f"Predictions in bf16 at time step {TIMESTEP} for random inputs (seed {SEED}): root mean square of the "
        "difference to fp32, as a part of the fp32 prediction's."
    )
    return f"{markdown_table(heads, rows)}\n{told} {described(facts['machine'])}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write FILE and a Markdown table beside it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="in fp32")
    add_report(parser)
    options = parser.parse_args(argv)
    require_buildable("cpu", "bf16")
    facts = {"machine": machine_facts(), "figures": list(map(figures_of, options.bundles))}
    write_report(options.json, facts, table(facts))


if __name__ == "__main__":
    run_program(main)
