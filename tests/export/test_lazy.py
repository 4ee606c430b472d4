"""Weights that stay in their files: modules that are built, traced and run without holding them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from onnxscript import ir
from safetensors.torch import save_file
from torch import nn

from tandemrt.export import graph as graphs
from tandemrt.export.checkpoint import read_checkpoint
from tandemrt.export.conditioning import text_conditioning
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.graph import onnx_from_module
from tandemrt.export.lazy import attach, attached, parameters_on_meta, run, stored_tensors
from tandemrt.export.text_encoders import text_encoder_graph
from tandemrt.export.weights import read_header
from tandemrt.runtime.errors import CheckpointError

from .mini import UNET_FILE, edit_tensors, loaded


class Layers(nn.Module):
    """Parameters in a leaf, beside children, shared between two layers, and buffers stored or computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.table = nn.Parameter(torch.ones(4))
        self.register_buffer("stored", torch.ones(4))
        self.register_buffer("computed", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.table + self.stored * self.computed


def lazy_layers(folder: Path) -> tuple[nn.Module, nn.Module]:
    """A module with its weights, stored as float16, and one that reads them from a file."""
    torch.manual_seed(0)
    eager = Layers().half().float().requires_grad_(False)
    path = folder / "layers.safetensors"
    save_file({name: tensor.half().clone() for name, tensor in eager.state_dict().items()}, path)
    with parameters_on_meta():
        lazy = Layers().eval()
    attach(lazy, stored_tensors(read_header(path)))
    return eager, lazy


def test_layers_are_read_while_they_run_and_given_back(tmp_path: Path) -> None:
    eager, lazy = lazy_layers(tmp_path)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(run(lazy, x), eager(x))
    assert all(parameter.is_meta for parameter in lazy.parameters())
    assert lazy.first.weight is lazy.second.weight
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in lazy.modules())


def test_a_weight_that_is_used_outside_its_layer_shows(tmp_path: Path) -> None:
    _, lazy = lazy_layers(tmp_path)
    lazy.forward = lambda x: x @ lazy.first.weight
    assert run(lazy, torch.ones(1, 4)).isnan().all()


def test_a_layer_that_fails_is_given_back_too(tmp_path: Path) -> None:
    _, lazy = lazy_layers(tmp_path)
    with pytest.raises(RuntimeError):
        run(lazy, torch.ones(1, 5))
    assert all(parameter.is_meta for parameter in lazy.parameters())
    assert attached(lazy).keys() == lazy.state_dict().keys()


def test_weights_that_are_not_finite_are_named(own_checkpoint: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_in.bias"][1] = torch.nan
        tensors["conv_out.weight"][0] = -torch.inf

    edit_tensors(own_checkpoint / "unet" / UNET_FILE, damage)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in conv_in\.bias, conv_out\.weight\. Use an"):
        denoiser_graph(read_checkpoint(own_checkpoint).denoiser)


def test_the_same_graph_comes_of_weights_in_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's exporter makes of a module that holds its weights: the same nodes, the same initializers."""
    main = read_checkpoint(checkpoint)
    encoding = text_conditioning(main).encoders["text_encoder"]
    graph = text_encoder_graph(main.texts["text_encoder"].encoder, encoding)
    lazy = ir.to_proto(onnx_from_module("text_encoder", graph)).graph
    monkeypatch.setattr(graphs, "unread", lambda _module: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "bind_weights", lambda _model, _weights: None)
    loaded(graph)
    eager = ir.to_proto(onnx_from_module("text_encoder", graph)).graph
    assert lazy.node == eager.node
    first, second = ({each.name: each.SerializeToString() for each in made.initializer} for made in (lazy, eager))
    assert first == second
