"""Histograms of activations: that they count what was there, and what samples are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from tandemrt.calibrate.observers import BINS
from tandemrt.calibrate.ranges import Limits, collect_ranges
from tandemrt.runtime.errors import ArgumentError, ExecutionError

from .small_graphs import OUTLIER, samples_of, write_block

WATCHED = {"sample": False, "normal": True, "attended": True}
FEW = Limits(least_samples=3, threads=1)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_block(tmp_path_factory.mktemp("ranges") / "unet", outlier=40)


def values_of(model: Path, names: tuple[str, ...], folder: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    graph = onnx.load(model)
    graph.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    onnx.save(graph, folder / "giving.onnx")
    session = onnxruntime.InferenceSession(folder / "giving.onnx")
    return dict(zip(names, session.run(list(names), feeds), strict=True))


def test_what_is_counted_is_what_was_there(block: Path, tmp_path: Path) -> None:
    found = collect_ranges(block, WATCHED, samples_of(5), FEW)
    assert (found.samples, set(found.values)) == (5, set(WATCHED))
    seen = [values_of(block, ("normal", "attended"), tmp_path, feeds) for feeds in samples_of(5)()]
    for name in ("normal", "attended"):
        magnitudes = np.abs(np.stack([one[name] for one in seen]))
        histogram = found.values[name].histogram
        assert histogram.counts.sum() == magnitudes.size
        assert histogram.largest == pytest.approx(magnitudes.max(), rel=1e-5)
        assert BINS / 2 < histogram.used <= BINS
        expected = np.histogram(magnitudes, BINS, (0, BINS * histogram.width))[0]
        # Sums in another order round to the next bin now and then.
        assert np.abs(histogram.counts.cumsum() - expected.cumsum()).max() <= 3
        channels = found.values[name].channels
        assert channels is not None
        np.testing.assert_allclose(channels, magnitudes.max((0, 1, 2)), rtol=1e-5)
    assert found.values["normal"].channels.argmax() == OUTLIER


def test_parts_that_fit_the_memory_find_the_same(block: Path) -> None:
    calls = []

    def samples() -> Iterator[dict[str, Any]]:
        calls.append(1)
        return samples_of(3)()

    whole = collect_ranges(block, WATCHED, samples, FEW)
    together = len(calls)
    parts = collect_ranges(block, WATCHED, samples, Limits(least_samples=3, most_bytes=1, threads=1))
    assert len(calls) - together == together + 1
    for name in WATCHED:
        np.testing.assert_array_equal(whole.values[name].histogram.counts, parts.values[name].histogram.counts)


def test_progress_never_tells_of_more_than_there_is(block: Path) -> None:
    told: list[tuple[str, int, int]] = []
    few = Limits(least_samples=3, most_bytes=1, threads=1)
    collect_ranges(block, {"normal": True, "attended": True}, samples_of(5), few, lambda *one: told.append(one))
    assert all(done <= total for _, done, total in told)
    assert {(done, total) for label, done, total in told if "part 2" in label} == {(at, 5) for at in range(6)}


def test_a_range_grows_with_what_comes(block: Path) -> None:
    """A histogram is of the same width and counts whichever sample came first."""
    growing = [{**next(samples_of(1, seed)()), "timestep": np.array([10.0**seed], np.float32)} for seed in range(4)]
    up, down = (
        collect_ranges(block, {"timed": False}, lambda order=order: iter(order), FEW).values["timed"].histogram
        for order in (growing, growing[::-1])
    )
    assert (up.width, up.largest) == (down.width, down.largest)
    np.testing.assert_array_equal(up.counts, down.counts)


def test_what_is_0_everywhere_has_no_range(block: Path) -> None:
    zero = [{**one, "timestep": np.zeros(1, np.float32)} for one in samples_of(3)()]
    assert collect_ranges(block, {"timestep": False}, lambda: iter(zero), FEW).values == {}


def with_third(change: Callable[[dict[str, Any]], Any]) -> Callable[[], Iterator[dict[str, Any]]]:
    samples = list(samples_of(4)())
    change(samples[2])
    return lambda: iter(samples)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda one: one["sample"].fill(0.5), "unet: sample 2 is the same everywhere, got .*0.5"),
        (lambda one: one["sample"].__setitem__((0, 0, 0, 0), np.nan), "unet: sample 2: 'sample' has NaN or Inf"),
        (lambda one: one["timestep"].fill(np.inf), "unet: sample 2: 'timestep' has NaN or Inf"),
        (lambda one: one.pop("timestep"), r"unet: sample 2: no 'timestep', got \['sample'\]"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(block: Path, change: Callable[[dict[str, Any]], Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        collect_ranges(block, WATCHED, with_third(change), FEW)


def test_too_few_samples_are_refused(block: Path) -> None:
    with pytest.raises(ArgumentError, match=r"unet: samples, got 2, expected 3 or more\. Ask for fewer"):
        collect_ranges(block, WATCHED, samples_of(2), FEW)
    with pytest.raises(ArgumentError, match="unet: samples, got 0"):
        collect_ranges(block, WATCHED, samples_of(0), FEW)


def test_what_overflows_inside_is_told_with_its_sample(block: Path) -> None:
    samples = with_third(lambda one: one["timestep"].fill(3e38))
    with pytest.raises(ExecutionError, match="'attended' has NaN or Inf when it is given sample 2"):
        collect_ranges(block, {"attended": False}, samples, FEW)
