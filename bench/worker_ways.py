"""The ways of `tandemrt.bench.workers`: which sessions the branches of guidance run on, and how these have weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.backends.onnxruntime import session_options
from tandemrt.runtime.backends.openvino import OpenVinoSession, exact_products
from tandemrt.runtime.backends.openvino_graph import read_graph
from tandemrt.runtime.backends.providers import opened as opened_provider
from tandemrt.runtime.onnx_files import graph_tensors
from tandemrt.runtime.targets import parse_target

from .loops import Float32

BATCHED, TOKENS, TIMESTEP = "batched", 77, 500
ORT_TARGET = parse_target("onnxruntime:cpu:fp32")
_HINT = "f32"
_OUTSIDE_FROM_BYTES = "1024"

Crew: TypeAlias = tuple[ThreadPoolExecutor, ThreadPoolExecutor]
Run: TypeAlias = Callable[[], Float32]
Feeds: TypeAlias = Mapping[str, Float32]


@dataclass(frozen=True, slots=True)
class Way:
    """How a guided row runs: in so many calls at once, on so many sessions (of OpenVINO's: streams).

    weights: of ONNX Runtime's sessions: read by each from the bundle's graph; given to all by `add_initializer`; given
        so, and not packed for products; or mapped, with those packed, from the file that `save_mapped` writes.
    pinned: each worker's threads, the calling one among them, to CPUs of its own.
    """

    backend: str
    calls: int = 2
    sessions: int = 1
    weights: Literal["read", "given", "unpacked", "mapped"] = "read"
    pinned: bool = False


WAYS: Mapping[str, Mapping[str, Way]] = {
    "onnxruntime": {
        BATCHED: Way("onnxruntime", calls=1),
        "one session": Way("onnxruntime"),
        "two sessions": Way("onnxruntime", sessions=2),
        "two, weights given": Way("onnxruntime", sessions=2, weights="given"),
        "two, weights given, not packed": Way("onnxruntime", sessions=2, weights="unpacked"),
        "batched, weights mapped": Way("onnxruntime", calls=1, weights="mapped"),
        "one session, weights mapped": Way("onnxruntime", weights="mapped"),
        "two, weights mapped": Way("onnxruntime", sessions=2, weights="mapped"),
        "two, weights mapped, pinned": Way("onnxruntime", sessions=2, weights="mapped", pinned=True),
    },
    "openvino": {
        BATCHED: Way("openvino", calls=1),
        "two streams": Way("openvino", sessions=2),
        "two streams, pinned": Way("openvino", sessions=2, pinned=True),
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """A denoiser: the bundle's graph, where its mapped form goes, and the height and width of the latent."""

    model: Path
    mapped: Path
    latent: int

    def feeds(self) -> dict[str, Float32]:
        """Standard normal inputs of a guided row of one picture, two rows each, at `TIMESTEP`."""
        inputs, _ = graph_tensors(self.model)
        sizes: dict[int | str, int] = {"batch": 2, "steps": 2, "sequence": TOKENS}
        sizes |= {"height": self.latent, "width": self.latent}
        random, feeds = np.random.default_rng(0), dict[str, Float32]()
        for spec in inputs:
            shape = [int(sizes.get(size, size)) for size in spec.shape]
            feeds[spec.name] = random.standard_normal(shape).astype(np.float32)
        feeds["timestep"][...] = TIMESTEP
        return feeds


def opened(way: Way, case: Case, threads: int, crew: Crew) -> Run:
    """What predicts both branches of a row, (2, C, h, w) float32.

    Where they run at once it is on the calling thread and one of `crew`, or pinned, as a caller must not be, on both.
    """
    feeds = case.feeds()
    calls = [feeds] if way.calls == 1 else [_branch(feeds, 0), _branch(feeds, 1)]
    make = _onnxruntime_runs if way.backend == "onnxruntime" else _openvino_runs
    runs = list(make(way, case, threads, calls))
    if way.pinned and way.backend == "onnxruntime":
        for worker, block in zip(crew, cpu_blocks(), strict=True):
            worker.submit(os.sched_setaffinity, 0, block[:1]).result()
    if way.calls == 1:
        return runs[0]

    def both() -> Float32:
        begun = [worker.submit(run) for worker, run in zip(crew, runs, strict=True)]
        return np.concatenate([one.result() for one in begun])

    def beside() -> Float32:
        begun = crew[1].submit(runs[1])
        return np.concatenate([runs[0](), begun.result()])

    return both if way.pinned else beside


def _branch(feeds: Feeds, at: int) -> Feeds:
    """One of both rows, and whole what both share."""
    return {name: rows[at : at + 1] if len(rows) > 1 else rows for name, rows in feeds.items()}


def cpu_blocks() -> tuple[list[int], list[int]]:
    """The CPUs of each of two workers; both have the only one where there is one."""
    cpus = sorted(os.sched_getaffinity(0))
    half = max(1, len(cpus) // 2)
    return cpus[:half], cpus[-half:]


def save_mapped(case: Case) -> None:
    """Have ONNX Runtime write its optimized graph, with weights as they are and as it packs them in a file beside it.

    A session that loads it maps that file, and lays out nothing anew; done once.
    """
    if case.mapped.exists():
        return
    ort = imported("onnxruntime")
    options = session_options(ort, None)
    options.optimized_model_filepath = str(case.mapped)
    for key, value in (
        ("optimized_model_external_initializers_file_name", f"{case.mapped.name}_data"),
        ("optimized_model_external_initializers_min_size_in_bytes", _OUTSIDE_FROM_BYTES),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{key}", value)
    opened_provider(ort, case.model, options, ORT_TARGET)


def _onnxruntime_runs(way: Way, case: Case, threads: int, calls: Sequence[Feeds]) -> Iterator[Run]:
    ort, blocks = imported("onnxruntime"), cpu_blocks()
    given = _initializers(ort, case.model) if way.weights in ("given", "unpacked") else {}
    sessions = []
    for index in range(way.sessions):
        own = max(1, threads // way.sessions)
        options = session_options(ort, own)
        for name, value in given.items():
            options.add_initializer(name, value)
        if way.weights == "unpacked":
            options.add_session_config_entry("session.disable_prepacking", "1")
        if way.pinned and own > 1:  # of all threads but the calling one; it counts CPUs from 1
            cpus = (blocks[index][at % len(blocks[index])] + 1 for at in range(1, own))
            options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(map(str, cpus)))
        model = case.mapped if way.weights == "mapped" else case.model
        sessions.append(opened_provider(ort, model, options, ORT_TARGET))
    for index, feeds in enumerate(calls):
        yield _onnxruntime_run(ort, sessions[index % len(sessions)], feeds, given)


def _onnxruntime_run(ort: Any, session: Any, feeds: Feeds, given: Mapping[str, Any]) -> Run:
    made = np.zeros_like(feeds["sample"])
    io = session.io_binding()
    for name, rows in feeds.items():
        io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(rows))
    io.bind_ortvalue_output(session.get_outputs()[0].name, ort.OrtValue.ortvalue_from_numpy(made))

    def run(_given: Mapping[str, Any] = given) -> Float32:  # a session does not keep what it was given alive
        session.run_with_iobinding(io)
        return made

    return run


def _initializers(ort: Any, model: Path) -> dict[str, Any]:
    """The weights of a graph by name, as values of ONNX Runtime's that refer to one array each."""
    import onnx  # noqa: PLC0415 — so that ways that need none of it have not its memory

    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(model).graph.initializer if one.dims}
    return {name: ort.OrtValue.ortvalue_from_numpy(np.array(array)) for name, array in arrays.items()}


def _openvino_runs(way: Way, case: Case, threads: int, calls: Sequence[Feeds]) -> Iterator[Run]:
    core = imported("openvino").Core()
    configuration = {
        "INFERENCE_PRECISION_HINT": _HINT,
        "NUM_STREAMS": str(way.sessions),
        "INFERENCE_NUM_THREADS": str(threads),
        "ENABLE_CPU_PINNING": "YES" if way.pinned else "NO",
        **exact_products("cpu"),
    }
    compiled = core.compile_model(read_graph(core, case.model, _HINT, "cpu"), "CPU", configuration)
    session = OpenVinoSession(case.model.parent.name, compiled, *graph_tensors(case.model))
    for feeds in calls:
        binding = session.bind({name: rows.shape for name, rows in feeds.items()})
        for name, rows in feeds.items():
            binding.inputs[name][...] = rows
        yield partial(_openvino_run, binding)


def _openvino_run(binding: Any) -> Float32:
    binding.run()
    made: Float32 = next(iter(binding.outputs.values()))
    return made
