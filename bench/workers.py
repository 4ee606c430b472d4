"""Two workers on a CPU: `python -m tandemrt.bench.workers BUNDLE ... --json FILE`.

Ways to run both branches of a guided row at once, each in an interpreter of its own: what it adds to the memory of the
process, and its rows in turns with `batched` ones, one call of both branches on all threads. Memory is the proportional
set size: pages of a file that two sessions map count once, and not at all once the system took them back, as it may on
a machine that lacks memory. BUNDLE is the shapes family's (`tandemrt demo` exports it), or at true size what `tandemrt
export OUT --preset bk-sdm-tiny` makes. Take the figures on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tandemrt.runtime.architecture import usable_cpus
from tandemrt.runtime.bundle import Bundle

from .arguments import add_report, add_rounds
from .figures import cell, markdown_table, spread, write_report
from .machine import described, machine_facts
from .program import run_program
from .worker_ways import BATCHED, WAYS, Case, Way, opened, save_mapped


@dataclass(frozen=True, slots=True)
class Options:
    """Threads of all workers together, and how many rounds go before and count."""

    threads: int
    warm_up: int
    repeats: int


def way_figures(way: Way, case: Case, options: Options) -> dict[str, Any]:
    """What a way takes; for an interpreter of its own.

    memory_mib: the model with its buffers after a few rows. row_ms, batched_ms: of a guided row, in turns, from which
    `ratio` and, of the least of both, `least_ratio`. relative_rms: of its prediction, to the batched one's.
    """
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        crew = (first, second)
        before = _pss_mib()
        run = opened(way, case, options.threads, crew)
        for _ in range(3):
            made = run()
        memory = _pss_mib() - before
        batched = opened(WAYS[way.backend][BATCHED], case, options.threads, crew)
        taken: list[float] = []
        beside: list[float] = []
        for round_ in range(options.warm_up + options.repeats):
            for each, kept in ((batched, beside), (run, taken)):
                began = time.perf_counter()
                result = each()
                if round_ >= options.warm_up:
                    kept.append((time.perf_counter() - began) * 1e3)
                if each is batched:
                    meant = result
    return {
        "memory_mib": memory,
        "row_ms": spread(taken),
        "batched_ms": spread(beside),
        "ratio": spread(np.divide(taken, beside).tolist()),
        "least_ratio": min(taken) / min(beside),
        "relative_rms": float(np.linalg.norm(made - meant) / np.linalg.norm(meant)),
    }


def bundle_figures(path: Path, size: int | None, given: argparse.Namespace, options: Options) -> list[dict[str, Any]]:
    """The figures of all ways, on a bundle's first denoiser.

    Raises:
        BundleError: the bundle is damaged, foreign or newer than this runtime.
    """
    bundle = Bundle.open(path)
    manifest, name = bundle.manifest, bundle.manifest.names("denoiser")[0]
    latent = (size or manifest.defaults.height) // manifest.latent.downsampling
    figures = []
    with TemporaryDirectory(dir=given.scratch) as scratch:
        case = Case(bundle.model_path(name), Path(scratch, "model.onnx"), latent)
        for backend in given.backend or WAYS:
            for label, way in WAYS[backend].items():
                if way.weights == "mapped":
                    _apart(save_mapped, case)
                one = _apart(way_figures, way, case, options)
                sized = {"bundle": bundle.path.name, "denoiser": name, "latent": latent}
                figures.append({**sized, "backend": backend, "way": label, **one})
    return figures


def _apart(work: Any, *arguments: Any) -> Any:
    """What a function returns, called in a fresh interpreter."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(work, *arguments).result()


def _pss_mib() -> float:
    """The proportional set size of this process."""
    with Path("/proc/self/smaps_rollup").open(encoding="ascii") as rollup:
        return next(int(line.split()[1]) / 2**10 for line in rollup if line.startswith("Pss:"))


def markdown(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown: medians with the 10th to 90th percentile."""
    heads = ("both branches at once", "memory, MiB", "a row, ms", "ratio to batched", "of the least", "difference")
    rows = [
        [
            f"{one['bundle']} {one['denoiser']}, {one['backend']}: {one['way']}",
            f"{one['memory_mib']:.0f}",
            cell(one["row_ms"], 1),
            cell(one["ratio"], 3),
            f"{one['least_ratio']:.3f}",
            f"{one['relative_rms']:.1e}",
        ]
        for one in facts["figures"]
    ]
    latents = {one["bundle"]: one["latent"] for one in facts["figures"]}
    sizes = ", ".join(f"{bundle} {side}x{side}" for bundle, side in latents.items())
    told = (
        f"{facts['threads']} threads in all, {facts['repeats']} rounds, latents {sizes}; medians, in brackets the 10th "
        "to 90th percentile. Ratios are of the same round, or of the fastest rows; memory is the proportional set size "
        "that a way adds to its process. "
    )
    return f"{markdown_table(heads, rows)}\n{told}{described(facts['machine'])}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write FILE and a Markdown table beside it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="in fp32")
    add_report(parser)
    parser.add_argument("--backend", action="append", choices=tuple(WAYS), help="by default both")
    parser.add_argument("--size", type=int, help="the picture's side in pixels; the bundle's own by default")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of all workers (default: one a CPU)")
    add_rounds(parser, 5, 100)
    parser.add_argument("--scratch", type=Path, help="a folder with space for a denoiser's weights, and half as much")
    given = parser.parse_args(argv)
    options = Options(given.threads, given.warm_up, given.repeats)
    facts: dict[str, Any] = {"machine": machine_facts(), "threads": given.threads, "repeats": given.repeats}
    facts["figures"] = [one for path in given.bundles for one in bundle_figures(path, given.size, given, options)]
    write_report(given.json, facts, markdown(facts))


if __name__ == "__main__":
    run_program(main)
