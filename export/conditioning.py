"""How a checkpoint's text encoders make a denoiser's conditioning, as the bundle's manifest states it."""

from __future__ import annotations

from collections.abc import Mapping

from ..runtime.errors import CheckpointError
from ..runtime.manifest import TextConditioning, TextEncoding
from .checkpoint import Checkpoint, Part, tokenizer_of
from .facts import DenoiserFacts, denoiser_facts, whole

# diffusers' `max_sequence_length` for SD3; the tokenizer itself would go on to 512.
T5_TOKENS = 256


def text_conditioning(main: Checkpoint, lengths: Mapping[str, int] | None = None) -> TextConditioning:
    """What the text encoders give, and how it is joined.

    lengths: how many tokens prompts are padded to, by text encoder, where the tokenizers have said so; the encoders'
        own limits otherwise.

    Raises:
        CheckpointError: a configuration states no sensible width, or the widths do not fit the denoiser.
    """
    single = len(main.family.text_encoders) == 1
    encoders = {
        name: _encoding(name, source.encoder, (lengths or {}).get(name) or text_limits(source.encoder)[0], single)
        for name, source in main.texts.items()
    }
    facts = denoiser_facts(main.denoiser)
    _require_widths(main, encoders, facts)
    absent = main.family.optional - encoders.keys()
    return TextConditioning(
        encoders=encoders,
        width=facts.text_width,
        zero_tokens=T5_TOKENS if absent else 0,
        zero_negative=main.zero_negative,
    )


def _require_widths(main: Checkpoint, encoders: Mapping[str, TextEncoding], facts: DenoiserFacts) -> None:
    """Compare what the encoders give with what the denoiser takes; only SD3 pads the encoders that stand together."""
    where, padded = f"{main.family.denoiser}: text conditioning", bool(main.family.optional)
    together = sum(encoder.width for encoder in encoders.values() if encoder.joins == "width")
    behind = {encoder.width for encoder in encoders.values() if encoder.joins == "sequence"}
    if not (together <= facts.text_width if padded else together == facts.text_width) or behind - {facts.text_width}:
        expected = " and ".join(f"{encoder.width} of {name}" for name, encoder in encoders.items())
        remedy = "Give a denoiser and text encoders of one model."
        raise CheckpointError(where, "width", got=facts.text_width, expected=f"what fits {expected}", remedy=remedy)
    pooled = sum(encoder.pooled_width for encoder in encoders.values())
    if facts.pooled_width not in (0, pooled):
        what, expected = "pooled width", f"{pooled}, as the text encoders give"
        raise CheckpointError(where, what, got=facts.pooled_width, expected=expected)


def text_limits(encoder: Part) -> tuple[int, int]:
    """How many positions and how many tokens a text encoder knows.

    Raises:
        CheckpointError: its configuration states no sensible numbers.
    """
    if encoder.class_name == "T5EncoderModel":
        return T5_TOKENS, whole(encoder, "vocab_size", 32128)
    return whole(encoder, "max_position_embeddings", 77), whole(encoder, "vocab_size", 49408)


def _encoding(name: str, encoder: Part, length: int, single: bool) -> TextEncoding:
    tokenizer = tokenizer_of(name)
    if encoder.class_name == "T5EncoderModel":
        width = whole(encoder, "d_model", 512)
        return TextEncoding(tokenizer=tokenizer, max_length=length, width=width, joins="sequence")
    width = whole(encoder, "hidden_size", 512)
    if single:
        return TextEncoding(tokenizer=tokenizer, max_length=length, width=width)
    projected = encoder.class_name == "CLIPTextModelWithProjection"
    return TextEncoding(
        tokenizer=tokenizer,
        max_length=length,
        width=width,
        # The last but one, before the final layer norm.
        hidden_state=f"hidden_states.{whole(encoder, 'num_hidden_layers', 12) - 1}",
        pooled="text_embeds" if projected else None,
        pooled_width=whole(encoder, "projection_dim", 512) if projected else 0,
    )
