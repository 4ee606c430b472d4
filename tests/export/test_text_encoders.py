"""Text encoders' graphs: their outputs, and the order that other programs go by."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tandemrt.export.checkpoint import Part
from tandemrt.export.lazy import run
from tandemrt.export.text_encoders import text_encoder_graph
from tandemrt.export.weights import read_header
from tandemrt.runtime.manifest import TextEncoding

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 40, "eos_token_id": 39}


def test_pooled_text_comes_first_and_the_configuration_is_complete(tmp_path: Path) -> None:
    """diffusers' SDXL pipeline takes an encoder's first output for the pooled text where it has two axes."""
    model = CLIPTextModelWithProjection(CLIPTextConfig(**SIZES))
    model.save_pretrained(tmp_path)
    encoding = TextEncoding(max_length=77, width=16, hidden_state="hidden_states.11", pooled="text_embeds")
    weights = read_header(tmp_path / "model.safetensors")
    graph = text_encoder_graph(Part(tmp_path, "CLIPTextModelWithProjection", SIZES, weights), encoding)
    assert [spec.name for spec in graph.outputs[:3]] == ["text_embeds", "last_hidden_state", "hidden_states.0"]
    outputs = run(graph.module, torch.tensor([[3, 5, 39, 0]]))
    named = {"batch": 1, "sequence": 4}
    for spec, output in zip(graph.outputs, outputs, strict=True):
        assert output.shape == tuple(named.get(size, size) for size in spec.shape)  # type: ignore[call-overload]
    assert graph.config["num_hidden_layers"] == 12
    assert graph.config["projection_dim"] == 512
