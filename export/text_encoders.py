"""Text encoders as graphs: CLIP's, with or without projection, and T5's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ..runtime.manifest import TensorSpec, TextEncoding
from .checkpoint import Part
from .facts import whole
from .lazy import StoredTensor, parameters_on_meta, stored_tensors
from .modules import UNUSABLE, Graph, fill, float_spec, frozen, unusable

# Attention as plain products: what the fused kernels compute, in operators that every exporter knows.
_CONFIG = {"attn_implementation": "eager", "dtype": "float32"}


class _Clip(nn.Module):
    """The last hidden state and a pooled vector; where `states` are wanted, the hidden state before each layer too.

    The order is that of transformers' outputs, by which diffusers' pipelines for SDXL and SD3 find the pooled vector.
    """

    def __init__(self, model: CLIPTextModel | CLIPTextModelWithProjection, *, states: bool) -> None:
        super().__init__()
        self.text_model = model
        self._states = states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        encoded = self.text_model(input_ids=input_ids, output_hidden_states=self._states)
        last = encoded.last_hidden_state
        both = (encoded.text_embeds, last) if "text_embeds" in encoded else (last, encoded.pooler_output)
        # The tuple's last is the last layer's, which no pipeline reads before its norm.
        return *both, *(encoded.hidden_states[:-1] if self._states else ())


class _T5(nn.Module):
    def __init__(self, model: T5EncoderModel) -> None:
        super().__init__()
        self.text_model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_model(input_ids=input_ids).last_hidden_state


def text_encoder_graph(part: Part, encoding: TextEncoding) -> Graph:
    """A text encoder: input_ids (B, sequence) int64 → last_hidden_state (B, sequence, D) float32.

    CLIP's has pooler_output (B, D) after it, or text_embeds (B, P) before it where it has a projection; where the
    conditioning reads an inner hidden state, also hidden_states.N (B, sequence, D), the input of layer N, of every one.
    """
    return _t5_graph(part) if part.class_name == "T5EncoderModel" else _clip_graph(part, encoding)


def _clip_graph(part: Part, encoding: TextEncoding) -> Graph:
    projected = part.class_name == "CLIPTextModelWithProjection"
    tensors = stored_tensors(part.weights)
    try:
        config = CLIPTextConfig(**{**part.config, **_CONFIG})
        with parameters_on_meta():
            model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    except UNUSABLE as error:
        raise unusable(part, error) from error
    fill(model, _clip_names(tensors, model.state_dict()), part)
    return Graph(
        role="text_encoder",
        module=frozen(_Clip(model, states=_reads_states(encoding))),
        inputs=(TOKEN_IDS,),
        outputs=clip_outputs(part, encoding),
        # optimum reads both from config.json, where transformers may leave out what equals its default.
        config={
            "num_hidden_layers": config.num_hidden_layers,
            "projection_dim": config.projection_dim,
            **part.config,
        },
    )


def clip_outputs(part: Part, encoding: TextEncoding) -> tuple[TensorSpec, ...]:
    """The outputs of a CLIP text encoder, as `text_encoder_graph` describes them."""
    width, layers = whole(part, "hidden_size", 512), whole(part, "num_hidden_layers", 12)
    last = float_spec("last_hidden_state", "batch", "sequence", width)
    if part.class_name == "CLIPTextModelWithProjection":
        both = (float_spec("text_embeds", "batch", whole(part, "projection_dim", 512)), last)
    else:
        both = (last, float_spec("pooler_output", "batch", width))
    inner = [f"hidden_states.{layer}" for layer in range(layers)] if _reads_states(encoding) else []
    return *both, *(float_spec(name, "batch", "sequence", width) for name in inner)


def _t5_graph(part: Part) -> Graph:
    tensors = stored_tensors(part.weights)
    try:
        with parameters_on_meta():
            model = T5EncoderModel(T5Config(**{**part.config, **_CONFIG}))
    except UNUSABLE as error:
        raise unusable(part, error) from error
    # One table under two names, of which checkpoints hold either.
    table = next((tensors[name] for name in _T5_TABLE if name in tensors), None)
    if table is not None:
        tensors.update(dict.fromkeys(_T5_TABLE, table))
    fill(model, tensors, part)
    return Graph(
        role="text_encoder",
        module=frozen(_T5(model)),
        inputs=(TOKEN_IDS,),
        outputs=(float_spec("last_hidden_state", "batch", "sequence", model.config.d_model),),
        config=part.config,
    )


def _reads_states(encoding: TextEncoding) -> bool:
    return encoding.hidden_state != "last_hidden_state"


TOKEN_IDS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
_T5_TABLE = ("shared.weight", "encoder.embed_tokens.weight")
_PREFIX = "text_model."


def _clip_names(tensors: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors under this transformers version's names: with or without the prefix, without the position ids."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.position_ids")}
    prefixed = any(name.startswith(_PREFIX) for name in expected)
    if prefixed == any(name.startswith(_PREFIX) for name in kept):
        return kept
    return {_PREFIX + name if prefixed else name.removeprefix(_PREFIX): tensor for name, tensor in kept.items()}
