"""Text encoders as graphs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..runtime.manifest import TensorSpec
from .checkpoint import Part
from .modules import UNUSABLE, Graph, fill, float_spec, frozen, unusable
from .weights import load_tensors


class _TextEncoder(nn.Module):
    def __init__(self, text_model: CLIPTextModel) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.text_model(input_ids=input_ids)
        return encoded.last_hidden_state, encoded.pooler_output


def text_encoder_graph(part: Part) -> Graph:
    """CLIP's text model: input_ids (B, sequence) int64 → last_hidden_state (B, sequence, D), pooler_output (B, D)."""
    tensors = load_tensors(part.weights)
    try:
        model = CLIPTextModel(CLIPTextConfig(**{**part.config, "attn_implementation": "eager", "dtype": "float32"}))
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(model, _clip_names(tensors, model.state_dict()), part)
    width = model.config.hidden_size
    return Graph(
        role="text_encoder",
        module=frozen(_TextEncoder(model)),
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),),
        outputs=(
            float_spec("last_hidden_state", "batch", "sequence", width),
            float_spec("pooler_output", "batch", width),
        ),
        config=part.config,
    )


def _clip_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under this transformers version's names: with or without the prefix, without the position ids."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    prefix = "text_model."
    prefixed = any(name.startswith(prefix) for name in expected)
    if prefixed == any(name.startswith(prefix) for name in kept):
        return kept
    return {prefix + name if prefixed else name.removeprefix(prefix): tensor for name, tensor in kept.items()}
