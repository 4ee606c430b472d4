"""A denoiser in int8 beside bf16 and fp32: `python -m tandemrt.bench.quantized DIR --json FILE`.

What quantizing takes, in a process of its own, and what a call takes then on each target, in turns in one run; with
`--weights`, also with weights alone in eight and four bits. DIR is a denoiser's folder in an fp32 bundle, such as
`unet` of `tandemrt export OUT --preset sdxs-512-0.9`. Samples are random latents and texts: they calibrate a speed, no
picture. Take the figures on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tandemrt.calibrate.int8 import Int8Settings, quantize_int8
from tandemrt.calibrate.ranges import Limits
from tandemrt.calibrate.weights_only import WeightSettings, quantize_weights
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Session
from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.engine_files import GRAPH_NAME
from tandemrt.runtime.onnx_files import external_files, graph_tensors
from tandemrt.runtime.targets import parse_target

from .arguments import add_report, add_rounds, add_threads
from .figures import cell, markdown_table, spread, write_report
from .loops import Float32
from .machine import described, machine_facts
from .memory import in_fresh_process, peak_gib, resident_mib
from .program import run_program

TARGETS = (
    "openvino:cpu:fp32",
    "openvino:cpu:bf16",
    "openvino:cpu:int8",
    "onnxruntime:cpu:fp32",
    "onnxruntime:cpu:int8",
)
GOALS = {"openvino int8 over bf16, SDXS-512": 1.5, "calibration peak_gib, sd15": 20}
TOKENS = 77
WEIGHTS = {"int8-weights": 8, "int4-weights": 4}

Case = tuple[str, str]
"""A target, and the format of the graph that runs on it: `float`, `int8`, or one of `WEIGHTS`."""


@dataclass(frozen=True, slots=True)
class Options:
    """Height and width of the latent, samples to calibrate on, threads of a model, rounds before and that count."""

    latent: int
    samples: int
    threads: int | None
    warm_up: int
    repeats: int


def samples_of(model: Path, options: Options) -> Iterator[dict[str, Float32]]:
    """Random inputs of a denoiser, one row each, the time steps spread over all."""
    inputs, _ = graph_tensors(model)
    sizes: dict[int | str, int] = {"batch": 1, "steps": 1, "sequence": TOKENS}
    sizes |= {"height": options.latent, "width": options.latent}
    random = np.random.default_rng(0)
    for timestep in np.linspace(999, 1, options.samples):
        shapes = {spec.name: [int(sizes.get(size, size)) for size in spec.shape] for spec in inputs}
        sample = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        yield {**sample, "timestep": np.full(shapes["timestep"], timestep, np.float32)}


def calibration_figures(model: Path, out: Path, options: Options) -> dict[str, Any]:
    """Quantize a denoiser; seconds and the peak of resident memory, mapped parts of files among it."""
    began = time.perf_counter()
    settings = Int8Settings(limits=Limits(least_samples=options.samples, threads=options.threads))
    report = quantize_int8(model, lambda: samples_of(model, options), out, settings)
    return {
        "seconds": time.perf_counter() - began,
        "peak_gib": peak_gib(),
        "samples": options.samples,
        "layers": len(report.layers),
        "kept": len(report.kept),
        "settings": dict(report.settings),
    }


def cases_of(targets: Sequence[str], *, weights: bool) -> list[Case]:
    """What is measured on some targets: the int8 graph on those in int8, on others the float one and others of it."""
    forms = {True: ("int8",), False: ("float", *(WEIGHTS if weights else ()))}
    return [(target, form) for target in targets for form in forms[parse_target(target).precision == "int8"]]


def latency_figures(
    models: Mapping[Case, Path], feeds: Mapping[str, Float32], options: Options
) -> list[dict[str, Any]]:
    """Milliseconds a call of each case, all of one backend loaded at once and called in turns.

    models: the graph's file by case.
    """
    rows = []
    for backend in dict.fromkeys(parse_target(target).backend for target, _ in models):
        cases = [case for case in models if parse_target(case[0]).backend == backend]
        sessions = [_session(models[case], case[0], options) for case in cases]
        bindings = [session.bind({name: array.shape for name, array in feeds.items()}) for session in sessions]
        taken: list[list[float]] = [[] for _ in bindings]
        for round_ in range(options.warm_up + options.repeats):
            for binding, kept in zip(bindings, taken, strict=True):
                for name, array in feeds.items():
                    binding.inputs[name][...] = array
                began = time.perf_counter()
                binding.run()
                if round_ >= options.warm_up:
                    kept.append((time.perf_counter() - began) * 1e3)
        meant = next(iter(bindings[0].outputs.values()))
        for (target, form), binding, kept in zip(cases, bindings, taken, strict=True):
            made = next(iter(binding.outputs.values()))
            speed_over = {
                other[0]: spread(np.divide(times, kept).tolist())
                for other, times in zip(cases, taken, strict=True)
                if other[1] == "float" and other != (target, form)
            }
            rows.append(
                {
                    "target": target,
                    "format": form,
                    "call_ms": spread(kept),
                    "speed_over": speed_over,
                    "relative_rms": float(np.linalg.norm(made - meant) / np.linalg.norm(meant)),
                    "model_mib": _model_bytes(models[target, form]) / 2**20,
                }
            )
        for session in sessions:
            session.close()
    return rows


def loaded_mib(model: Path, target: str, feeds: Mapping[str, Float32], options: Options) -> float:
    """What this process grows by when it loads a model and runs it once; for one that did nothing else."""
    imported(parse_target(target).backend)
    before = resident_mib()
    session = _session(model, target, options)
    binding = session.bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()
    grown = resident_mib() - before
    session.close()
    return grown


def markdown(facts: dict[str, Any]) -> str:
    """The figures as Markdown tables: medians with the 10th to 90th percentile."""
    rows = [
        [
            f"`{row['target']}`{', ' + row['format'] if row['format'] in WEIGHTS else ''}",
            cell(row["call_ms"], 0),
            *(_speed(row, precision) for precision in ("fp32", "bf16")),
            f"{row['relative_rms']:.4f}",
            f"{row['model_mib']:.0f}",
            f"{row['loaded_mib']:.0f}",
        ]
        for row in facts["rows"]
    ]
    made, head = facts["calibration"], f"A latent of {facts['latent']}.\n\n"
    if made is not None:
        head = (
            f"Quantizing {made['layers']} layers on {made['samples']} samples: {made['seconds']:.0f} s, "
            f"{made['peak_gib']:.1f} GiB at the peak; latent {facts['latent']}.\n\n"
        )
    note = (
        "\nMedians, in brackets the 10th to 90th percentile; speeds are ratios within a round; the error is the RMS of "
        "the difference to the output of the backend's first target over the RMS of that. Loaded: what a fresh process "
        "grows by until its first call has run, mapped parts of files among it. Random weights. "
    )
    heads = ("a call", "ms", "speed over fp32", "over bf16", "relative error", "model, MiB", "loaded, MiB")
    table = markdown_table(heads, rows) + note if rows else ""
    return head + table + described(facts["machine"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="DIR", help="a denoiser's folder in an fp32 bundle")
    add_report(parser)
    parser.add_argument("--target", action="append", help=f"by default {', '.join(TARGETS)}")
    parser.add_argument("--weights", action="store_true", help="also with weights alone in eight and four bits")
    parser.add_argument("--calibrate-only", action="store_true", help="quantize, and measure no call; fp16 will do")
    parser.add_argument("--latent", type=int, default=64, help="height and width of the latent")
    parser.add_argument("--samples", type=int, default=8, help="what is calibrated on")
    add_threads(parser)
    add_rounds(parser, 2, 15)
    parser.add_argument("--scratch", type=Path, help="a folder with space for the quantized model")
    given = parser.parse_args(arguments)
    options = Options(given.latent, given.samples, given.threads, given.warm_up, given.repeats)
    model = given.model / GRAPH_NAME
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS, "latent": f"{given.latent}x{given.latent}"}
    with TemporaryDirectory(dir=given.scratch) as scratch:
        cases = [] if given.calibrate_only else cases_of(given.target or TARGETS, weights=given.weights)
        graphs = {"float": model, **{form: Path(scratch, form, GRAPH_NAME) for form in ("int8", *WEIGHTS)}}
        used = {"int8"} if given.calibrate_only else {form for _, form in cases}
        facts["calibration"] = None
        if "int8" in used:
            facts["calibration"] = in_fresh_process(calibration_figures, model, graphs["int8"], options)
        for form in used & set(WEIGHTS):
            quantize_weights(model, graphs[form], WeightSettings(WEIGHTS[form]))
        models = {(target, form): graphs[form] for target, form in cases}
        feeds = next(samples_of(model, options))
        facts["rows"] = latency_figures(models, feeds, options)
        for row in facts["rows"]:
            graph = models[row["target"], row["format"]]
            row["loaded_mib"] = in_fresh_process(loaded_mib, graph, row["target"], feeds, options)
    write_report(given.json, facts, markdown(facts))


def _session(model: Path, target: str, options: Options) -> Session:
    return open_session(model, parse_target(target), threads=options.threads)


def _speed(row: Mapping[str, Any], precision: str) -> str:
    over = [figures for target, figures in row["speed_over"].items() if parse_target(target).precision == precision]
    return cell(over[0], 2) if over else ""


def _model_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in (model, *(model.parent / name for name in external_files(model))))


if __name__ == "__main__":
    run_program(main)
