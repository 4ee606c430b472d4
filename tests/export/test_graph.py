"""Exported graphs: what ONNX Runtime makes of them at sizes they were not traced with, and in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import ir

from tandemrt.export import graph as graphs
from tandemrt.export.agreement import latent_space
from tandemrt.export.audit import find_islands
from tandemrt.export.autoencoders import decoder_graph
from tandemrt.export.checkpoint import read_autoencoder, read_checkpoint
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.graph import onnx_from_module, save
from tandemrt.export.half import half_from_float
from tandemrt.export.modules import Graph
from tandemrt.export.parity import THRESHOLDS, compare, max_relative_error, require_close
from tandemrt.export.samples import Inputs
from tandemrt.runtime.errors import ExportError
from tandemrt.runtime.manifest import Precision

from .family import require_one_time_step_serves
from .mini import TEXT_WIDTH, UNET_FILE, edit_tensors

LATENT = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 6, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def denoiser(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    graph = denoiser_graph(read_checkpoint(checkpoint).denoiser)
    return graph, save(onnx_from_module("unet", graph), tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tiny: Path) -> tuple[Graph, ir.Model]:
    """A tiny decoder and its graph; not to be changed."""
    graph = decoder_graph(read_autoencoder(tiny), latent_space(read_checkpoint(checkpoint).vae))
    return graph, onnx_from_module("vae_decoder_tiny", graph)


@pytest.fixture
def decoder(exported: tuple[Graph, ir.Model]) -> Graph:
    return exported[0]


@pytest.fixture
def model(exported: tuple[Graph, ir.Model]) -> ir.Model:
    return exported[1].clone()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def inputs(batch: int, height: int, width: int, sequence: int = 24) -> Inputs:
    timestep = np.linspace(0.5, 999, batch, dtype=np.float32)
    return {
        "sample": noise(batch, 4, height, width),
        "timestep": timestep,
        "encoder_hidden_states": noise(batch, sequence, TEXT_WIDTH),
    }


# The first exporter run limits a batch to 63 by a rule about memory layouts that no ONNX graph has.
@pytest.mark.parametrize(
    "given", [inputs(1, 2, 2), inputs(5, 18, 2), inputs(65, 4, 4), inputs(1, 32, 64), inputs(2, 8, 8, sequence=77)]
)
def test_a_denoiser_runs_at_every_size_batch_and_text_length(denoiser: tuple[Graph, Path], given: Inputs) -> None:
    graph, model = denoiser
    require_close("unet", compare("unet", graph, model, [given], "fp32"))


def test_one_time_step_serves_a_whole_batch(denoiser: tuple[Graph, Path]) -> None:
    """optimum's pipelines give the time step as one number, whatever the batch. Of sizes too: see test_sdxl."""
    require_one_time_step_serves(denoiser[1], inputs(3, 4, 6))


def test_a_graph_says_nothing_of_the_machine_it_was_made_on(denoiser: tuple[Graph, Path]) -> None:
    raw = denoiser[1].read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in raw
    assert b"stack_trace" not in raw
    names = [node.name for node in onnx.load(denoiser[1]).graph.node]
    assert len(set(names)) == len(names)
    assert "down_blocks.1.resnets.0.conv1/Conv" in names


def test_the_same_weights_give_the_same_bytes(decoder: Graph, model: ir.Model, tmp_path: Path) -> None:
    again = onnx_from_module("vae_decoder_tiny", decoder)
    assert save(model, tmp_path).read_bytes() == ir.to_proto(again).SerializeToString()


def test_large_weights_go_to_a_file_beside_the_model(
    decoder: Graph, model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "EXTERNAL_DATA_ABOVE", 100)
    path = save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    # All but the biases, which are too small to be worth a place of their own.
    assert (tmp_path / "model.onnx_data").stat().st_size > 0.95 * decoder.parameters * 4
    require_close("decoder", compare("decoder", decoder, path, [LATENT], "fp32"))


@pytest.mark.parametrize(("precision", "defect"), [("fp32", 0.01), ("fp16", 10.0)])
def test_one_wrong_weight_is_noticed(
    exported: tuple[Graph, ir.Model], tmp_path: Path, precision: Precision, defect: float
) -> None:
    decoder, model = exported[0], exported[1].clone()
    if precision == "fp16":
        half_from_float(model, find_islands(model, [LATENT], tmp_path))
    path = save(model, tmp_path)
    require_close("decoder", compare("decoder", decoder, path, [LATENT], precision))
    damaged = onnx.load(path)
    weight = next(tensor for tensor in damaged.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += defect
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(damaged, path)
    with pytest.raises(
        ExportError, match=r"vae_decoder: sample: max_relative_error .*\(1, 4, 6, 8\).*expected at most"
    ):
        require_close("vae_decoder", compare("vae_decoder", decoder, path, [LATENT], precision))


def test_a_graph_that_is_no_onnx_is_an_error_of_the_export(decoder: Graph, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="decoder: the exported graph does not load in ONNX Runtime"):
        compare("decoder", decoder, tmp_path / "model.onnx", [LATENT], "fp32")


def test_a_search_for_islands_that_cannot_run_is_an_error_of_the_export(model: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fp32 islands: the exported graph does not run in ONNX Runtime"):
        find_islands(model, [{}], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_search_for_islands_leaves_cores_to_others(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: onnxruntime.SessionOptions, **rest: object) -> None:
            spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
            granted.append((options.intra_op_num_threads, spinning))
            super().__init__(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    find_islands(model, [LATENT], tmp_path)
    assert granted == [(torch.get_num_threads(), "0")]


def test_control_flow_over_values_is_an_error_of_the_export(decoder: Graph) -> None:
    class Branching(torch.nn.Module):
        def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
            return latent_sample if latent_sample.sum() > 0 else -latent_sample

    branching = Graph("vae_decoder", Branching(), decoder.inputs, decoder.outputs, {})
    with pytest.raises(ExportError, match="odd: torch's exporter failed") as caught:
        onnx_from_module("odd", branching)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("actual", "error"), [([1.0, 2.0], 0.0), ([1.0, 2.5], 0.25), ([1.0, np.nan], np.inf), ([np.inf, 2.0], np.inf)]
)
def test_the_metric(actual: list[float], error: float) -> None:
    assert max_relative_error(np.array(actual), np.array([1.0, 2.0])) == error


def test_half_precision_is_strongly_typed_with_float_at_the_border(half_bundle: Path) -> None:
    """Every operator's operands agree in type, as TensorRT demands of a strongly typed network."""
    for path in half_bundle.glob("*/model.onnx"):
        model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        border = [*model.graph.input, *model.graph.output]
        kinds = {value.type.tensor_type.elem_type for value in border}
        assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
        weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
        assert weights <= {onnx.TensorProto.FLOAT16}


def test_casts_stand_only_between_the_precisions(half_bundle: Path) -> None:
    for path in half_bundle.glob("*/model.onnx"):
        model = ir.load(path)
        casts = [node for node in model.graph if node.op_type == "Cast"]
        for node in casts:
            assert node.inputs[0].dtype != node.outputs[0].dtype
            producer = node.inputs[0].producer()
            assert producer is None or producer.op_type != "Cast"


def test_islands_save_what_would_overflow(own_checkpoint: Path, tmp_path: Path) -> None:
    """A decoder whose values exceed 65504, as the stock SDXL one's do: without islands it gives infinities."""
    edit_tensors(own_checkpoint / "vae" / UNET_FILE, lambda tensors: tensors["decoder.conv_in.weight"].mul_(3e5))
    vae = read_checkpoint(own_checkpoint).vae
    graph = decoder_graph(vae, latent_space(vae))
    model = onnx_from_module("vae_decoder", graph)
    by_kind = frozenset(node for node in model.graph if node.op_type in ("InstanceNormalization", "Softmax"))
    audited = find_islands(model, [LATENT], tmp_path)
    names = {node.name for node in audited}
    assert "decoder.conv_in/Conv" in names
    assert "decoder.conv_out/Conv" not in names
    for name, islands, fits in (("kinds", by_kind, False), ("audited", audited, True)):
        (tmp_path / name).mkdir()
        path = _half_copy(model, islands, tmp_path / name)
        error = compare("vae_decoder", graph, path, [LATENT], "fp16")[0].evidence.value
        assert (error <= THRESHOLDS["fp16"]) is fits


def _half_copy(model: ir.Model, islands: frozenset[ir.Node], folder: Path) -> Path:
    """Half precision of a copy, `islands` found again by their names."""
    copy = model.clone()
    names = {node.name for node in islands}
    half_from_float(copy, frozenset(node for node in copy.graph if node.name in names))
    return save(copy, folder)
