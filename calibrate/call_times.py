"""What a call of each quantized component takes beside the float one's, on the target that pictures are judged on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from ..engines.job import Progress
from ..runtime import Pipeline
from ..runtime.architecture import cpu_architecture, usable_cpus
from ..runtime.backends import gpu_names
from ..runtime.bundle import Bundle
from ..runtime.calibrations import CallTime
from ..runtime.trace import Trace
from .judged import Painting, Way
from .ranges import silent

ROUNDS, LEAST_ROUNDS = 7, 3
_SECONDS = 1.0  # from here on no more than the least rounds
_ROWS = 2


def call_times(
    bundle: Bundle,
    made: Bundle,
    ways: Mapping[str, Sequence[Way]],
    painting: Painting,
    progress: Progress = silent,
) -> dict[str, CallTime]:
    """Of each component in `ways`, quantized in `made`: its calls for one picture, in turns with those of `bundle`.

    A denoiser's call is a row, with both branches where guidance runs. Both bundles' models are loaded at once. A text
    encoder whose tokenizer makes the same of all texts is not run again, and left out.

    Raises:
        TandemError: the target cannot run, or a model failed.
    """
    manifest = bundle.manifest
    runs = list(_runs(ways, {name: manifest.components[name].role for name in ways}))
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with ExitStack() as opened:
        float_one, quantized = (
            opened.enter_context(
                Pipeline.open(one.path, painting.target, threads=painting.threads, cache=painting.cache)
            )
            for one in (bundle, made)
        )
        for round_ in range(1 + ROUNDS):
            progress("calls beside the float bundle's", round_, 1 + ROUNDS)
            found = [_calls(pipeline, runs, painting, round_) for pipeline in (float_one, quantized)]
            if not round_:  # the first one loads and warms up
                began = time.perf_counter()
                continue
            rounds.append((found[0], found[1]))
            if len(rounds) >= LEAST_ROUNDS and time.perf_counter() - began > _SECONDS:
                break
        target = quantized.target
    progress("calls beside the float bundle's", 1 + ROUNDS, 1 + ROUNDS)
    machine = (cpu_architecture(), f"{usable_cpus()} CPUs", *gpu_names(target))
    return {
        name: _call_time([(first[name], second[name]) for first, second in rounds], str(target), painting, machine)
        for name in ways
        if all(name in first and name in second for first, second in rounds)
    }


def _runs(ways: Mapping[str, Sequence[Way]], roles: Mapping[str, str]) -> Iterator[tuple[str, int, str | None]]:
    """A denoiser, its rows and a decoder of each run, so that all components run; no decoder where none is asked."""
    counts = {name: count for own in ways.values() for way in own for name, count in way.steps}
    denoisers = [name for name, role in roles.items() if role == "denoiser"] or list(counts)[:1]
    decoders = [name for name, role in roles.items() if role == "vae_decoder"]
    for index in range(max(len(denoisers), len(decoders))):
        denoiser = denoisers[min(index, len(denoisers) - 1)]
        yield denoiser, min(_ROWS, counts[denoiser]), decoders[index] if index < len(decoders) else None


def _calls(
    pipeline: Pipeline, runs: Sequence[tuple[str, int, str | None]], painting: Painting, round_: int
) -> dict[str, float]:
    """What a call of each component took in these runs, in milliseconds."""
    arguments = {name: value for name, value in painting.arguments.items() if name != "timesteps"}
    calls: dict[str, list[float]] = {}
    for denoiser, count, decoder in runs:
        trace = Trace()
        with trace.recording():
            # Another text each time, as what one was encoded to is kept.
            output = pipeline(
                " ".join("a" * (1 + round_)),
                steps=((denoiser, count),),
                decoder=decoder,
                seed=painting.seed,
                output_type="latent" if decoder is None else "np",
                **arguments,
            )
        others = set(pipeline.bundle.manifest.components) - set(pipeline.bundle.manifest.names("denoiser"))
        for event in trace.events:
            name = event["args"].get("about")
            if event["cat"] == "model" and name in others:
                calls.setdefault(name, []).append(event["dur"] / 1e3)
        calls.setdefault(denoiser, []).extend(row.model_ms for row in output.timings.rows)
    return {name: float(np.median(taken)) for name, taken in calls.items()}


def _call_time(
    rounds: Sequence[tuple[float, float]], target: str, painting: Painting, machine: tuple[str, ...]
) -> CallTime:
    ratios = [quantized / max(float_one, 1e-6) for float_one, quantized in rounds]
    return CallTime(
        float_ms=float(np.median([float_one for float_one, _ in rounds])),
        quantized_ms=float(np.median([quantized for _, quantized in rounds])),
        ratio=float(np.median(ratios)),
        least_ratio=min(ratios),
        most_ratio=max(ratios),
        rounds=len(rounds),
        target=target,
        threads=painting.threads,
        machine=machine,
    )
