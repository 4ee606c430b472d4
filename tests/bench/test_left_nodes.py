"""Nodes that a provider leaves to the processor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from tandemrt.bench import left_nodes, published
from tandemrt.bench.left_nodes import left_told, sentence
from tandemrt.bench.reports.schema import read_report
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.targets import parse_target

from ..runtime.tiny_bundle import write_tiny_bundle

CUDA = "onnxruntime:cuda"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("left") / "bundle"
    write_tiny_bundle(folder)
    return Bundle.open(folder)


def test_nodes_are_counted_where_the_session_put_them(bundle: Bundle) -> None:
    model = bundle.model_path("vae_decoder")
    found = left_nodes.left_nodes(model, parse_target("onnxruntime:cpu"))
    assert found is not None
    left, total = found
    assert 0 < left.total() == total <= len(onnx.load(model).graph.node)
    assert set(left) <= {node.op_type for node in onnx.load(model).graph.node}


def test_models_of_a_picture_are_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"unet": (Counter(Shape=3, Gather=2), 40), "text_encoder": (Counter(), 9)}
    asked = []

    def in_fresh_process(function: object, model: Path, target: object) -> left_nodes.Left | None:
        assert function is left_nodes.left_nodes and str(target) == f"{CUDA}:fp32"
        asked.append(model.parent.name)
        if model.parent.name == "vae_decoder":
            raise RuntimeError("not loaded")
        return found.get(model.parent.name, (Counter(), 1))

    monkeypatch.setattr(left_nodes, "in_fresh_process", in_fresh_process)
    assert list(left_told(bundle, CUDA)) == [
        f"On {CUDA} 5 of the 40 nodes of unet run on the processor: Shape 3, Gather 2.",
        f"On {CUDA} it is not told which nodes of vae_decoder run on the processor.",
    ]
    assert "vae_encoder" not in asked


def test_of_many_kinds_the_most_frequent_are_told() -> None:
    (told,) = sentence("unet", CUDA, (Counter({f"Kind{count}": count for count in range(1, 8)}), 99))
    assert told.endswith("28 of the 99 nodes of unet run on the processor: "
                         "Kind7 7, Kind6 6, Kind5 5, Kind4 4, Kind3 3 and others.")  # fmt: skip


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu:bf16", "tensorrt-rtx:sm89"])
def test_other_targets_leave_nothing(target: str, bundle: Bundle) -> None:
    assert list(left_told(bundle, target)) == []


def test_of_tensorrts_providers_it_is_not_told(bundle: Bundle) -> None:
    (told,) = left_told(bundle, "onnxruntime:tensorrt")
    assert "it is not told which" in told


def test_it_is_told_on_the_first_page(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "left_told", lambda _bundle, target: [f"On {target} something is left."])
    asked = ["--target", "onnxruntime:cpu", "--rounds", "1", "--component", "vae_decoder", "--side", "8"]
    assert main(["bench", "limits", str(bundle.path), *asked, "--copied", "8", "--out", str(tmp_path)]) == 0
    assert read_report(tmp_path / "report.json").caveats[0] == "On onnxruntime:cpu something is left."
