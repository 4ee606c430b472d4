"""The limits that models are held to: what is counted, what is measured with, and what the table says."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tandemrt.bench import limits_command
from tandemrt.bench.graph_work import weight_bytes
from tandemrt.bench.rates import CHAIN, Options, copy_graph, in_turns, product_graph
from tandemrt.bench.reports.schema import Section, read_report
from tandemrt.engines.calls import call_of
from tandemrt.engines.graph_files import read_graph
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import ExecutionError
from tandemrt.runtime.targets import Target, parse_target

SMALL = ["--side", "64", "--copied", "4096", "--warm-up", "1", "--rounds", "3", "--threads", "1"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_product_is_what_its_rate_is_counted_from(precision: str) -> None:
    call = call_of(product_graph(16, precision), {"x": (16, 16)}, "product")
    assert call is not None
    assert call.multiply_adds == CHAIN * 16**3


@pytest.mark.parametrize("target", ["onnxruntime:cpu:fp32", "onnxruntime:cpu:int8", "openvino:cpu:int8"])
def test_products_of_eight_bits_are_those_of_floats(target: str, tmp_path: Path) -> None:
    made = []
    for precision, on in (("fp32", "onnxruntime:cpu:fp32"), (target.rpartition(":")[2], target)):
        path = tmp_path / f"{precision}.onnx"
        path.write_bytes(product_graph(64, precision).SerializeToString())
        binding = open_session(path, parse_target(on), threads=1).bind({"x": (64, 64)})
        binding.inputs["x"][...] = np.random.default_rng(1).standard_normal((64, 64))
        binding.run()
        made.append(next(iter(binding.outputs.values())).copy())
    assert 0.2 < np.std(made[0]) < 4
    assert np.abs(made[1] - made[0]).max() < 0.5 * np.std(made[0])


def test_every_round_begins_with_the_next_binding() -> None:
    ran: list[str] = []
    bindings: list[Any] = [SimpleNamespace(run=partial(ran.append, name)) for name in "abc"]
    taken = in_turns(bindings, Options(64, 64, 1, 1, 2))
    assert "".join(ran) == "abcbcacab"
    assert [one.size for one in taken] == [2, 2, 2]


def test_a_further_target_that_fails_is_told(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def section(_bundle: object, target: Target, *_: object) -> Section:
        if target.backend == "openvino":
            raise ExecutionError("unet", "failed while loading")
        return Section(key=str(target), title="", columns=(), rows=())

    monkeypatch.setattr(limits_command, "limits_section", section)
    asked = ["bench", "limits", str(shapes_bundle), "--out", str(tmp_path), "--force"]
    assert main([*asked, "--target", "onnxruntime:cpu", "--target", "openvino:cpu"]) == 0
    report = read_report(tmp_path / "report.json")
    assert [one.key for one in report.sections] == ["onnxruntime:cpu"]
    assert "Not measured: openvino:cpu, unet: failed while loading." in report.caveats
    assert main([*asked, "--target", "openvino:cpu"]) == 1


def test_the_copy_reads_and_writes_every_number(tmp_path: Path) -> None:
    path = tmp_path / "copy.onnx"
    path.write_bytes(copy_graph(5).SerializeToString())
    binding = open_session(path, parse_target("onnxruntime:cpu"), threads=1).bind({"x": (5,)})
    binding.inputs["x"][...] = np.arange(5)
    binding.run()
    assert np.array_equal(binding.outputs["y"], -np.arange(5, dtype=np.float32))


def test_weights_count_as_they_are_computed_with_and_tables_of_tokens_do_not(shapes_bundle: Path) -> None:
    bundle, name = Bundle.open(shapes_bundle), "text_encoder"
    graph = read_graph(bundle.model_path(name)).graph
    sizes = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"} & set(sizes)
    assert tables
    rest = sum(size for table, size in sizes.items() if table not in tables)
    assert 0 < rest < bundle.component(name).parameters
    assert [weight_bytes(graph, one) for one in ("fp32", "bf16", "int8")] == [4 * rest, 2 * rest, 2 * rest]


def test_weights_in_four_bits_count_so() -> None:
    numbers, scales = helper.make_tensor("w", TensorProto.INT4, (8, 4), [1] * 32), np.ones(4, np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scales"], ["wide"], axis=1),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [numbers, numpy_helper.from_array(scales, "scales")])
    assert weight_bytes(graph, "fp32") == 32 // 2 + 4 * 4


def test_figures_of_a_bundle(shapes_bundle: Path, tmp_path: Path) -> None:
    asked = ["--component", "unet", "--component", "vae_decoder", "--out", str(tmp_path)]
    assert main(["bench", "limits", str(shapes_bundle), "--target", "onnxruntime:cpu", *asked, *SMALL]) == 0
    (section,) = read_report(tmp_path / "report.json").sections
    unet, decoder, product, copy = section.rows
    assert [row.name for row in section.rows] == [
        "unet, fp32",
        "vae_decoder, fp32",
        "a product of 64 x 64, fp32",
        "a copy",
    ]
    weights = 4e-6 * Bundle.open(shapes_bundle).component("unet").parameters
    latents_text_and_timestep = 4e-6 * (2 * 4 * 8 * 8 + 77 * 128 + 1)
    assert weights < unet.figures["bytes"].median <= weights + 2 * latents_text_and_timestep
    assert decoder.figures["flops"].median > unet.figures["flops"].median > 0.1
    # The slower of both limits counts.
    for row in (unet, decoder):
        figures = {name: figure.values for name, figure in row.figures.items()}
        assert figures["gflops"] == pytest.approx(1e3 * figures["flops"] / figures["call"])
        by_work = figures["gflops"] / product.figures["gflops"].values
        by_bytes = figures["bytes"] / copy.figures["gbytes"].values / figures["call"]
        assert figures["share"] == pytest.approx(np.maximum(by_work, by_bytes))
