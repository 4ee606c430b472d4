"""The shapes family in int8: right as often as in fp32, a third as large, and one graph for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tandemrt.bench.precisions import COMPONENTS, GOALS, STEPS, captions, picture_facts
from tandemrt.bench.shapes.accuracy import Pixels, Way, paint, size_of
from tandemrt.calibrate.layers import layers_of
from tandemrt.calibrate.trajectories import Trajectories
from tandemrt.engines.graph_files import read_graph
from tandemrt.engines.job import Job
from tandemrt.engines.tensorrt import build
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_files import InputRange
from tandemrt.runtime.targets import parse_target

# One of these is less than a point.
PROMPTS = 104
# Of the median picture, for which 44 were measured: four times the error of that is missed. Of all together 31 were
# measured, because three pictures came out another way, as right as before.
MIN_MEDIAN_DB, MIN_PSNR_DB = 38, 27
# A sample in so many; there are 8 prompts, and of each 4 time steps in both branches.
EVERY = 9

Arrays = Mapping[str, npt.NDArray[np.generic]]


def painted(bundle: Path, target: str) -> Pixels:
    with Pipeline.open(bundle, target, threads=1) as pipeline:
        return paint(pipeline, Way("large", {"unet": STEPS}), captions(PROMPTS, "held_out"))


@pytest.fixture(scope="module")
def in_fp32(shapes_bundle: Path) -> Pixels:
    return painted(shapes_bundle, "onnxruntime:cpu")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_as_many_pictures_show_their_prompts(target: str, shapes_int8: Path, in_fp32: Pixels) -> None:
    prompts = captions(PROMPTS, "held_out")
    assert not set(prompts) & set(captions(8, "train"))
    facts = picture_facts(painted(shapes_int8 / "bundle", target), in_fp32, prompts)
    assert facts["points_below_fp32"] <= GOALS["int8_right_points_below_fp32"]
    assert facts["right"]["share"] > 0.9
    assert MIN_MEDIAN_DB <= facts["median_psnr_db"] < 99
    assert facts["psnr_db"] >= MIN_PSNR_DB


@pytest.mark.slow
def test_files_are_a_third_as_large(shapes_bundle: Path, shapes_int8: Path) -> None:
    before, after = (Bundle.open(path).manifest for path in (shapes_bundle, shapes_int8 / "bundle"))
    for name in COMPONENTS:
        assert size_of(after, [name])["megabytes"] < 0.4 * size_of(before, [name])["megabytes"]
    assert size_of(after, COMPONENTS)["megabytes"] < 0.34 * size_of(before, COMPONENTS)["megabytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPONENTS)
def test_one_graph_is_for_every_backend(name: str, shapes_bundle: Path, shapes_int8: Path, tmp_path: Path) -> None:
    floats, made = Bundle.open(shapes_bundle), Bundle.open(shapes_int8 / "bundle")
    quantization = made.component(name).quantization
    assert quantization is not None
    every = {one.name for one in layers_of(read_graph(floats.model_path(name)), name)}
    layers = every - set(quantization.kept)
    assert all("time" in layer for layer in quantization.kept)
    assert len(layers) == quantization.layers > len(every) * 0.85
    samples = list(Trajectories.open(shapes_int8 / "trajectories", floats).samples(name))[::EVERY]
    require_agreement(floats.model_path(name), made.model_path(name), samples)
    assert built_in_eight_bits(made.model_path(name), samples[0], tmp_path) >= layers


def require_agreement(floats: Path, model: Path, samples: list[Arrays]) -> None:
    """Compare what ONNX Runtime and OpenVINO make of a graph in int8, in fp32 all else, over all samples.

    Sums of another order tip numbers in the middle between two of the eight bits' to the other one. Had every rounding
    gone another way, the two would differ by √2 of what rounding takes from the float graph's numbers; half of that was
    measured, and nothing in the text encoder.
    """
    exact, first, second = (
        np.concatenate([ran(path, target, feeds) for feeds in samples])
        for path, target in (
            (floats, "onnxruntime:cpu:fp32"),
            (model, "onnxruntime:cpu:int8"),
            (model, "openvino:cpu:fp32"),
        )
    )
    rounding = np.linalg.norm(first - exact)
    assert 0 < rounding < 0.05 * np.linalg.norm(exact)
    assert np.linalg.norm(second - first) < rounding


def ran(model: Path, target: str, feeds: Arrays) -> npt.NDArray[np.generic]:
    """The first output, flat."""
    session = open_session(model, parse_target(target), threads=1)
    binding = session.bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()
    found = next(iter(binding.outputs.values())).ravel().copy()
    session.close()
    return found


def built_in_eight_bits(model: Path, feeds: Arrays, folder: Path) -> set[str]:
    """The nodes of TensorRT-RTX's layers that dequantize both that they multiply."""
    shapes = {name: InputRange(min=array.shape, opt=array.shape, max=array.shape) for name, array in feeds.items()}
    job = Job(
        component=model.parent.name,
        model=str(model),
        folder=str(folder),
        backend="tensorrt-rtx",
        device="sm89",
        precision="int8",
        profiles=(shapes,),
        flags={},
    )
    layers = build(job, lambda label, done, total: None).layers
    dense = [layer for layer in layers if layer.kind in ("gemm", "correlation")]
    return {
        node for layer in dense if sum("DequantizeLinear" in one for one in layer.nodes) >= 2 for node in layer.nodes
    }
