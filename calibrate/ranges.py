"""How large the activations of a graph are: histograms of what its layers read, over samples of what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ..engines.graph_files import read_graph
from ..engines.job import Progress
from ..engines.layer_graphs import batches, giving, values_of
from ..runtime.errors import ArgumentError, ExecutionError
from .graph_runs import Array, GraphRun
from .observers import BINS, Counts, Histogram

_CHUNK = 1 << 20
# Ranges are powers of two from here on, which leaves room for a bin's width in float32.
_LEAST_EXPONENT = -100
_PICTURE_RANK = 4

Samples = Callable[[], Iterable[Mapping[str, Array]]]


@dataclass(frozen=True, slots=True)
class Range:
    """What was seen of a value: a histogram of its magnitudes, and the largest magnitude at each place of the last
    axis where it was asked for.
    """

    histogram: Histogram
    channels: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Ranges:
    """What was seen of a graph's values over so many samples; one that was 0 everywhere is not among them."""

    samples: int
    values: Mapping[str, Range]


@dataclass(frozen=True, slots=True)
class Limits:
    """least_samples: how many there must be. most_bytes: of activations at once. threads: ONNX Runtime's."""

    least_samples: int = 4
    most_bytes: int = 2 << 30
    threads: int | None = None


LIMITS = Limits()


def silent(label: str, done: int, total: int) -> None:
    """Report to nobody."""


def collect_ranges(
    model: Path,
    values: Mapping[str, bool],
    samples: Samples,
    limits: Limits,
    progress: Progress = silent,
) -> Ranges:
    """Run a graph on every sample and count the magnitudes of some of its values.

    One run's activations are held at a time; where these take more than `limits.most_bytes`, the graph runs once for
    each part of them, and `samples` is called once for each.

    values: their names, and for each whether channels are watched.
    samples: gives what the graph is given, by input name, anew whenever it is called.
    progress: told of the part and the samples done; what it raises ends the collection.

    Raises:
        ArgumentError: too few samples, or one that has NaN, Inf or a latent that is the same everywhere.
        ExecutionError: the graph cannot be run, or makes NaN or Inf of a sample.
    """
    graph, where = read_graph(model), model.parent.name
    seen = {name: _Seen(channels) for name, channels in values.items()}
    first = next(iter(samples()), None)
    if first is None:
        raise ArgumentError(where, "samples", got=0, expected=f"{limits.least_samples} or more")
    parts = list(_parts(graph, values, checked(first, 0, graph, where), limits.most_bytes, where))
    count, total = 0, limits.least_samples
    for part, instrumented in enumerate(parts):
        run = GraphRun(instrumented, model.parent, where, limits.threads)
        label = f"{where}: ranges, part {part + 1} of {len(parts)}"
        count = 0
        for index, sample in enumerate(samples()):
            # How many there are is known when they have been read once.
            progress(label, index, max(total, index + 1))
            feeds = checked(sample, index, graph, where)
            given = {name: feeds[name] for name in values if name in feeds} if part == 0 else {}
            for name, array in {**run(feeds), **given}.items():
                if not seen[name].add(array):
                    raise ExecutionError(where, f"{name!r} has NaN or Inf when it is given sample {index}")
            count = index + 1
        progress(label, count, count)
        total = count
        if count < limits.least_samples:
            remedy = "Ask for fewer, or collect more; few samples tell little of what the others reach."
            raise ArgumentError(where, "samples", got=count, expected=f"{limits.least_samples} or more", remedy=remedy)
    found = {name: one.range() for name, one in seen.items()}
    return Ranges(count, {name: one for name, one in found.items() if one is not None})


def checked(sample: Mapping[str, Array], index: int, graph: onnx.ModelProto, where: str) -> dict[str, Array]:
    """A sample as the graph takes it.

    Raises:
        ArgumentError: it lacks an input, has NaN or Inf, or a latent or picture that is the same everywhere.
    """
    feeds = {}
    for value in graph.graph.input:
        tensor = value.type.tensor_type
        if value.name not in sample:
            expected = "an array for every input of the graph"
            raise ArgumentError(where, f"sample {index}: no {value.name!r}", got=sorted(sample), expected=expected)
        array = np.asarray(sample[value.name], helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ArgumentError(where, f"sample {index}: {value.name!r} has NaN or Inf", expected="finite numbers")
        feeds[value.name] = array
    # Of the inputs of such a rank the first is what the graph works on; others may well be 0, as without a ControlNet.
    latent = next((array for array in feeds.values() if array.ndim == _PICTURE_RANK and array.dtype.kind == "f"), None)
    if latent is not None and latent.size > 1 and latent.min() == latent.max():
        raise ArgumentError(where, f"sample {index} is the same everywhere", got=latent.flat[0], expected="a latent")
    return feeds


def _parts(
    graph: onnx.ModelProto, values: Mapping[str, bool], feeds: Mapping[str, Array], most_bytes: int, where: str
) -> Iterator[onnx.ModelProto]:
    """Graphs that give the values that nodes make, each no more than so many bytes of them."""
    shapes = {name: array.shape for name, array in feeds.items()}
    made = {one.name: one for one in values_of(graph, shapes)}
    unknown = [name for name in values if name not in made and name not in feeds]
    if unknown:
        what = "values that no node makes, or whose type does not follow from the graph"
        raise ExecutionError(where, what, got=unknown[:5])
    for group in batches([made[name] for name in made if name in values], most_bytes):
        yield giving(graph, group, {})


class _Seen:
    """A histogram whose range doubles, bins joining in pairs, whenever something larger comes."""

    def __init__(self, channels: bool) -> None:
        self._counts: Counts = np.zeros(BINS, np.int64)
        self._exponent: int | None = None
        self._largest = 0.0
        self._watches_channels = channels
        self._channels: npt.NDArray[np.float32] | None = None

    def add(self, array: Array) -> bool:
        """Count an array's magnitudes; False, with nothing counted, where one is NaN or Inf."""
        magnitudes = np.abs(array.astype(np.float32, copy=False))
        largest = float(magnitudes.max(initial=0))
        if not np.isfinite(largest):
            return False
        if self._watches_channels:
            channels = magnitudes.reshape(-1, magnitudes.shape[-1]).max(0)
            self._channels = channels if self._channels is None else np.maximum(self._channels, channels)
        self._cover(largest)
        bins_per_unit = np.float32(BINS / 2.0 ** (self._exponent or 0))
        flat = magnitudes.ravel()
        for start in range(0, flat.size, _CHUNK):
            places = (flat[start : start + _CHUNK] * bins_per_unit).astype(np.intp)
            self._counts += np.bincount(places, minlength=BINS)
        return True

    def range(self) -> Range | None:
        """What was seen; None where all was 0."""
        if self._exponent is None:
            return None
        return Range(Histogram(self._counts, 2.0**self._exponent / BINS, self._largest), self._channels)

    def _cover(self, largest: float) -> None:
        self._largest = max(self._largest, largest)
        if largest == 0:
            return
        # frexp: largest < 2 ** exponent
        needed = max(int(np.frexp(largest)[1]), _LEAST_EXPONENT)
        while self._exponent is not None and self._exponent < needed:
            self._counts = np.concatenate([self._counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self._exponent += 1
        if self._exponent is None:
            self._exponent = needed
