"""The ways to quantize a graph, all used alike: how many layers, which hurt most, the graph with some of them kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..engines.graph_files import read_graph
from ..engines.job import Progress
from ..runtime.manifest import QuantizationFormat
from .fp8 import Fp8Settings, quantize_fp8, require_e4m3
from .graph_runs import Array
from .int8 import Int8Plan, Int8Settings, int8_plan, quantize_int8, watched
from .kept_ranges import kept_ranges
from .layers import by_weight, layers_of
from .ledger import Ledger
from .nncf_int8 import NncfSettings, quantize_nncf, require_nncf
from .quantized import Quantized
from .ranges import Ranges, collect_ranges
from .sensitivity import Sweep, worst_layers
from .weights_only import WeightSettings, errors_of, quantize_weights, require_bits, weight_readers

# Of the samples, as many as errors of layers are compared on: each costs a run for every measurement.
SWEPT_SAMPLES = 8


@dataclass(frozen=True)
class Work:
    """What is quantized: a graph, what it is given where the format needs that, and what stays in floating point.

    samples: gives so many at most, spread evenly, anew whenever it is called. count: how many of them calibrate.
    ranges: the file that keeps what is found of the graph's values, by a name that says what it rests on.
    ledger: has what was measured by then of the layers' errors, for which it is needed.
    """

    model: Path
    samples: Callable[[int], Iterator[Mapping[str, Array]]] | None
    count: int
    keep: tuple[str, ...]
    ranges: Path
    ledger: Ledger | None
    progress: Progress


@dataclass(frozen=True, slots=True)
class Ranked:
    """The layers of one weight, and their share in what all of their graph's layers together take."""

    layers: tuple[str, ...]
    share: float


class Quantizer(Protocol):
    """A graph in the making; what is found out once serves every candidate."""

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Those quantized with none kept but those named; those of one weight together, which stay or go as one."""

    def ranked(self) -> Iterator[Ranked]:
        """These layers weight by weight, those that hurt most first; as many are measured as are taken."""

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        """Write the graph with these layers left in floating point too."""


class _Static:
    """int8 of weights and activations."""

    def __init__(self, work: Work, settings: Int8Settings) -> None:
        self._work, self._settings = work, replace(settings, keep=work.keep)

    @cached_property
    def _ranges(self) -> Ranges:
        model, limits = self._work.model, self._settings.limits
        values = watched(layers_of(read_graph(model), model.parent.name))
        return kept_ranges(
            self._work.ranges, lambda: collect_ranges(model, values, self._samples, limits, self._progress)
        )

    @cached_property
    def _plan(self) -> Int8Plan:
        graph, folder = read_graph(self._work.model), self._work.model.parent
        return int8_plan(graph, layers_of(graph, folder.name), self._ranges, self._settings, folder)

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        return by_weight(self._plan.layers)

    def ranked(self) -> Iterator[Ranked]:
        if self._work.ledger is None:
            raise ValueError("a sweep needs a ledger")
        samples = tuple(self._given(min(SWEPT_SAMPLES, self._work.count)))
        sweep = Sweep(self._work.model, self._plan, samples, self._settings.limits.threads)
        found = worst_layers(sweep, self._work.ledger, self._work.progress)
        return (Ranked(one.layers, one.share) for one in found)

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        settings = replace(self._settings, keep=(*self._settings.keep, *kept))
        return quantize_int8(self._work.model, self._samples, out, settings, self._ranges, self._work.progress)

    def _samples(self) -> Iterator[Mapping[str, Array]]:
        return self._given(self._work.count)

    def _given(self, most: int) -> Iterator[Mapping[str, Array]]:
        if self._work.samples is None:
            raise ValueError("int8 needs samples")
        return self._work.samples(most)

    def _progress(self, label: str, done: int, least: int) -> None:
        self._work.progress(label, done, self._work.count)


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
    """Weights alone, in eight bits or four. Which layers hurt most is told by what rounding does to their weights."""

    def __init__(self, work: Work, bits: int) -> None:
        self._work, self._settings = work, WeightSettings(bits, work.keep)
        self._layers = tuple(names for names in weight_readers(work.model) if not set(names) & set(work.keep))

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        return self._layers

    def ranked(self) -> Iterator[Ranked]:
        every = errors_of(self._work.model, self._settings)
        errors = {names: every[names[0]] for names in self._layers}
        together = sum(errors.values()) or 1.0
        worst = sorted(errors, key=lambda names: -errors[names])
        return (Ranked(names, errors[names] / together) for names in worst)

    def write(self, out: Path, kept: tuple[str, ...]) -> Quantized:
        settings = replace(self._settings, keep=(*self._settings.keep, *kept))
        return quantize_weights(self._work.model, out, settings)


NEEDS_SAMPLES: frozenset[QuantizationFormat] = frozenset({"int8", "fp8"})
BITS: Mapping[QuantizationFormat, int] = {"int8-weights": 8, "int4-weights": 4}
FORMATS: Mapping[QuantizationFormat, Callable[[Work, Int8Settings], Quantizer]] = {
    "int8": _Static,
    "fp8": _E4M3,
    "int8-weights": lambda work, settings: _Weights(work, BITS["int8-weights"]),
    "int4-weights": lambda work, settings: _Weights(work, BITS["int4-weights"]),
}
# Other makers of a format, by the names of their packages.
TOOLS: Mapping[str, tuple[QuantizationFormat, Callable[[Work, Int8Settings], Quantizer]]] = {"nncf": ("int8", _Nncf)}


def layer_names(model: Path, form: QuantizationFormat) -> tuple[str, ...]:
    """The layers of a graph that a format can quantize.

    Raises:
        ArgumentError: the graph is quantized already, or has none.
        BundleError: the graph cannot be read, or its opset has not what the format takes.
    """
    graph, where = read_graph(model), model.parent.name
    if form == "fp8":
        require_e4m3(graph, where)
    if form in NEEDS_SAMPLES:
        return tuple(one.name for one in layers_of(graph, where))
    require_bits(graph, where, BITS[form])
    return tuple(name for names in weight_readers(model) for name in names)
