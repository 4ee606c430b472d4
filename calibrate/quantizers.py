"""The ways to quantize a graph, all used alike: how many layers, which hurt most, the graph with some of them kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from ..engines.graph_files import read_graph
from ..engines.job import Progress
from ..runtime.manifest import QuantizationFormat
from .fp8 import Fp8Settings, quantize_fp8
from .graph_runs import Array
from .int8 import Int8Plan, Int8Settings, int8_plan, quantize_int8, watched
from .layers import layers_of
from .nncf_int8 import NncfSettings, quantize_nncf, require_nncf
from .quantized import Quantized
from .ranges import Ranges, Samples, collect_ranges
from .sensitivity import Sweep, worst_layers
from .weights_only import WeightSettings, quantize_weights, ranked_by_error, weight_readers

# Errors of layers are compared on so many samples: each costs a run for every measurement.
SWEPT_SAMPLES = 4


@dataclass(frozen=True)
class Work:
    """What is quantized: a graph, what it is given where the format needs that, and what stays in floating point."""

    model: Path
    samples: Samples | None
    keep: tuple[str, ...]
    progress: Progress


class Quantizer(Protocol):
    """A graph in the making; what is found out once serves every candidate."""

    @property
    def layers(self) -> int:
        """How many layers would be quantized with none kept but those named."""

    def worst(self, count: int) -> tuple[str, ...]:
        """So many of these layers, those that hurt most."""

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        """Write the graph with these layers left in floating point too."""


class _Static:
    """int8 of weights and activations."""

    def __init__(self, work: Work, settings: Int8Settings) -> None:
        self._work, self._settings = work, replace(settings, keep=work.keep)
        self._graph, where = read_graph(work.model), work.model.parent.name
        layers = layers_of(self._graph, where)
        self._ranges: Ranges = collect_ranges(
            work.model, watched(layers), self._samples, settings.limits, work.progress
        )
        self._plan: Int8Plan = int8_plan(self._graph, layers, self._ranges, self._settings, work.model.parent)
        self._ranking: Iterator[str] | None = None
        self._ranked: list[str] = []

    @property
    def layers(self) -> int:
        return len(self._plan.layers)

    def worst(self, count: int) -> tuple[str, ...]:
        if self._ranking is None:
            samples = tuple(islice(self._samples(), SWEPT_SAMPLES))
            sweep = Sweep(self._work.model, self._plan, samples, self._settings.limits.threads)
            self._ranking = (one.layer for one in worst_layers(sweep, {}, self._work.progress))
        self._ranked += islice(self._ranking, count - len(self._ranked)) if count > len(self._ranked) else ()
        return tuple(self._ranked[:count])

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        settings = replace(self._settings, keep=(*self._settings.keep, *kept))
        return quantize_int8(self._work.model, self._samples, out, settings, self._ranges, self._work.progress)

    def _samples(self) -> Iterator[Mapping[str, Array]]:
        if self._work.samples is None:
            raise ValueError("int8 needs samples")
        return iter(self._work.samples())


class _E4M3(_Static):
    """FP8 of weights and activations. Which layers hurt most is told by int8, which rounds the same values."""

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        settings = Fp8Settings((*self._settings.keep, *kept), self._settings.limits)
        return quantize_fp8(self._work.model, self._samples, out, settings, self._ranges, self._work.progress)


class _Nncf(_Static):
    """int8 by NNCF. Which layers hurt most is told by our own, which quantizes the same ones."""

    def __init__(self, work: Work, settings: Int8Settings) -> None:
        require_nncf()
        super().__init__(work, settings)

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        settings = NncfSettings(self._settings.smoothing, (*self._settings.keep, *kept))
        return quantize_nncf(self._work.model, self._samples, out, settings)


class _Weights:
    """Weights alone, in eight bits or four."""

    def __init__(self, work: Work, bits: int) -> None:
        self._work, self._settings = work, WeightSettings(bits, work.keep)
        self._ranked: tuple[str, ...] | None = None

    @property
    def layers(self) -> int:
        return len(self._ranking())

    def worst(self, count: int) -> tuple[str, ...]:
        return self._ranking()[:count]

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        settings = replace(self._settings, keep=(*self._settings.keep, *kept))
        return quantize_weights(self._work.model, out, settings)

    def _ranking(self) -> tuple[str, ...]:
        if self._ranked is None:
            every = ranked_by_error(self._work.model, self._settings)
            self._ranked = tuple(name for name in every if name not in self._settings.keep)
        return self._ranked


NEEDS_SAMPLES: frozenset[QuantizationFormat] = frozenset({"int8", "fp8"})
FORMATS: Mapping[QuantizationFormat, Callable[[Work, Int8Settings], Quantizer]] = {
    "int8": _Static,
    "fp8": _E4M3,
    "int8-weights": lambda work, settings: _Weights(work, 8),
    "int4-weights": lambda work, settings: _Weights(work, 4),
}


# Other makers of a format, by the names of their packages.
TOOLS: Mapping[str, tuple[QuantizationFormat, Callable[[Work, Int8Settings], Quantizer]]] = {"nncf": ("int8", _Nncf)}


def layer_names(model: Path, form: QuantizationFormat) -> tuple[str, ...]:
    """The layers of a graph that a format can quantize.

    Raises:
        ArgumentError: the graph is quantized already, or has none.
        BundleError: the graph cannot be read, or its opset cannot tell how it is quantized.
    """
    if form in NEEDS_SAMPLES:
        return tuple(one.name for one in layers_of(read_graph(model), model.parent.name))
    return weight_readers(model)
