"""A graph's inputs and outputs, read from the file without a parser of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.manifest import TensorSpec
from tandemrt.runtime.onnx_files import graph_tensors

from .tiny_bundle import write_tiny_bundle


def test_tensors_are_those_the_manifest_lists(tmp_path: Path) -> None:
    manifest = write_tiny_bundle(tmp_path / "bundle")
    for component in manifest.components.values():
        assert graph_tensors(tmp_path / "bundle" / component.model) == (component.inputs, component.outputs)


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        (["n", 4], ("n", 4)),
        ([None, "2 * n"], ("x_0", "2 * n")),
        ([-1, 0], ("x_0", "x_1")),
        ([], ()),
        ([1 << 62], (1 << 62,)),
    ],
)
def test_sizes_and_symbols(stated: list[int | str | None], read: tuple[int | str, ...], tmp_path: Path) -> None:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT16, stated)
    weight = numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    listed = helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3])
    made = helper.make_tensor_value_info("y", TensorProto.INT32, ["n"])
    graph = helper.make_graph([], "odd", [given, listed], [made], [weight])
    onnx.save_model(helper.make_model(graph), str(tmp_path / "model.onnx"))
    inputs, outputs = graph_tensors(tmp_path / "model.onnx")
    assert inputs == (TensorSpec(name="x", dtype="float16", shape=read),)
    assert outputs == (TensorSpec(name="y", dtype="int32", shape=("n",)),)


def test_a_type_no_manifest_has_is_refused(tmp_path: Path) -> None:
    given = helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])
    onnx.save_model(helper.make_model(helper.make_graph([], "odd", [given], [])), str(tmp_path / "model.onnx"))
    with pytest.raises(BundleError, match="tensor 'x' is of element type 8"):
        graph_tensors(tmp_path / "model.onnx")
