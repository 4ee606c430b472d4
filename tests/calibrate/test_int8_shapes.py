"""Which layers of a UNet of true topology hurt most in int8: the small one of the shapes family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.calibrate.int8 import Int8Settings, int8_plan, quantize_int8, watched
from tandemrt.calibrate.layers import layers_of
from tandemrt.calibrate.ledger import Ledger
from tandemrt.calibrate.ranges import Limits, collect_ranges
from tandemrt.calibrate.sensitivity import Sweep, worst_layers
from tandemrt.engines.graph_files import read_graph
from tandemrt.runtime.bundle import Bundle

from .test_int8 import ran, relative_rms

SETTINGS = Int8Settings(limits=Limits(threads=1))


def samples_of(bundle: Bundle, name: str) -> Callable[[], Iterator[dict[str, Any]]]:
    sizes: dict[int | str, int] = {"batch": 2, "steps": 1, "height": 8, "width": 8, "sequence": 16}

    def samples() -> Iterator[dict[str, Any]]:
        random = np.random.default_rng(0)
        for timestep in (981, 741, 501, 261, 21):
            made = {
                one.name: random.standard_normal([sizes.get(size, size) for size in one.shape]).astype(np.float32)
                for one in bundle.component(name).inputs
            }
            yield {**made, "timestep": np.array([timestep], np.float32)}

    return samples


@pytest.mark.slow
def test_the_ends_of_a_unet_hurt_most_and_keeping_them_helps(shapes_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(shapes_bundle)
    model, samples = bundle.model_path("unet_small"), samples_of(bundle, "unet_small")
    graph = read_graph(model)
    layers = layers_of(graph, "unet_small")
    ranges = collect_ranges(model, watched(layers), samples, SETTINGS.limits)
    plan = int8_plan(graph, layers, ranges, SETTINGS, model.parent)
    sweep = Sweep(model, plan, list(islice(samples(), 2)), threads=1)
    with Ledger(tmp_path / "found", {}) as ledger:
        worst = [one.layers[0] for one in islice(worst_layers(sweep, ledger), 3)]
        assert len(ledger) < len(plan.layers)
    assert {"conv_in/Conv", "conv_out/Conv"} & set(worst)
    feeds, errors = next(iter(samples())), []
    for keep in ((), tuple(worst)):
        quantize_int8(model, samples, tmp_path / "model.onnx", Int8Settings(keep=keep), ranges)
        errors.append(relative_rms(ran(tmp_path / "model.onnx", feeds), ran(model, feeds)))
    assert errors[1] < errors[0] * 0.8, errors
