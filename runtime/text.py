"""Prompts to what one text encoder makes of them, and the joining of several."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends.base import Array, Binding, Session
from .bundle import Bundle
from .errors import BundleError, NonFiniteError
from .lora_slots import Adapter, slot_inputs
from .manifest import TextConditioning
from .tokenizer import DroppedText, PromptTokenizer, Tokens
from .trace import span
from .transfers import place

__all__ = ["DroppedText", "Embeddings", "PromptEncoder", "Tokens", "joined", "merged"]

CACHED_PROMPTS = 64

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Prompts as numbers: `hidden` (B, tokens, width), `pooled` (B, pooled width) where it is used; float32."""

    hidden: Float32
    pooled: Float32 | None = None


class PromptEncoder:
    """A text encoder of a bundle and its tokenizer, with the latest embeddings kept; safe to share between threads.

    The cache is keyed by what decides the embedding, token ids and LoRAs: prompts that differ only in case share one.
    Each prompt runs alone, because a batch of another size may change the last bits; so a hit equals a fresh run.
    """

    def __init__(self, bundle: Bundle, name: str, session: Session, *, cached_prompts: int = CACHED_PROMPTS) -> None:
        """Load the tokenizer of the encoder `name`; `session` is that encoder, open, which stays the caller's to close.

        cached_prompts: how many embeddings are kept at most, 0 or more.

        Raises:
            BundleError: the tokenizer cannot be used.
        """
        self._name, self._facts = name, bundle.manifest.text.encoders[name]
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path(name), self._facts.max_length)
        self._session = session
        self._cached_prompts = cached_prompts
        self._cache: OrderedDict[tuple[Any, ...], Embeddings] = OrderedDict()
        self._binding: Binding | None = None
        self._in_slots: tuple[Any, ...] | None = None
        self._lock = threading.Lock()

    def tokenize(self, prompts: Sequence[str], *, strict: bool = False) -> Tokens:
        """As `PromptTokenizer.tokenize`."""
        return self._tokenizer.tokenize(prompts, strict=strict)

    def encode(
        self,
        prompts: Sequence[str],
        adapters: Sequence[Adapter] = (),
        *,
        held: Sequence[Adapter] = (),
        strict: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> tuple[Embeddings, tuple[DroppedText, ...]]:
        """What the encoder makes of prompts, of its own width, and the text that was dropped.

        adapters: LoRAs, where the session has slots for them. held: LoRAs that its weights hold meanwhile.
        before: called before each prompt; what it raises ends the encoding.

        Raises:
            RequestError: as `tokenize`.
            BundleError: the encoder's outputs have not the sizes the manifest says.
            ExecutionError: the text encoder failed, or returned NaN or Inf.
        """
        tokens = self.tokenize(prompts, strict=strict)
        embeddings = []
        for ids in tokens.ids:
            before()
            embeddings.append(self._embedding(ids, adapters, held))
        pooled = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
        hidden = np.stack([embedding.hidden for embedding in embeddings])
        return Embeddings(hidden, np.stack(pooled) if pooled else None), tokens.dropped

    def _embedding(
        self, ids: npt.NDArray[np.int64], adapters: Sequence[Adapter], held: Sequence[Adapter]
    ) -> Embeddings:
        key = (ids.tobytes(), tuple(adapter.key for adapter in adapters), tuple(adapter.key for adapter in held))
        with self._lock:
            embedding = self._cache.pop(key, None)
            if embedding is None:
                embedding = self._computed(ids, adapters)
            self._cache[key] = embedding
            while len(self._cache) > self._cached_prompts:
                self._cache.popitem(last=False)
            return embedding

    def _computed(self, ids: npt.NDArray[np.int64], adapters: Sequence[Adapter]) -> Embeddings:
        facts, binding = self._facts, self._bound(len(ids), adapters)
        binding.inputs["input_ids"][0] = ids
        with span("model", self._name):
            binding.run()
        hidden = self._output(binding, facts.hidden_state, (facts.max_length, facts.width))
        pooled = None if facts.pooled is None else self._output(binding, facts.pooled, (facts.pooled_width,))
        return Embeddings(hidden, pooled)

    def _bound(self, tokens: int, adapters: Sequence[Adapter]) -> Binding:
        """The encoder's buffers with LoRAs in their slots, if it has any."""
        wanted = tuple(adapter.key for adapter in adapters)
        if self._binding is None or self._in_slots != wanted:
            slots = slot_inputs(self._session.inputs, adapters)
            if self._binding is None:
                shapes = {name: values.shape for name, values in slots.items()}
                self._binding = self._session.bind({"input_ids": (1, tokens), **shapes})
            self._in_slots = None  # nothing to rely on, should it fail halfway
            place(self._binding, slots)
            self._in_slots = wanted
        return self._binding

    def _output(self, binding: Binding, name: str, shape: tuple[int, ...]) -> Float32:
        """A copy of an output's only row: the next run overwrites the output."""
        output: Array | None = binding.outputs.get(name)
        if output is None or output.shape != (1, *shape):
            got = {name: array.shape for name, array in binding.outputs.items()}
            raise BundleError(self._name, "outputs", got=got, expected=f"{name} {(1, *shape)}")
        if not np.isfinite(output).all():
            raise NonFiniteError(self._name, f"NaN or Inf in {name}", expected="finite values")
        copied: Float32 = output[0].astype(np.float32)
        return copied


def joined(text: TextConditioning, parts: Sequence[Embeddings]) -> Embeddings:
    """What all text encoders made, in the manifest's order, as (B, text.max_length, text.width) and (B, pooled width).

    As `encode_prompt` of diffusers' StableDiffusionXLPipeline and StableDiffusion3Pipeline join them.
    """
    hidden = np.zeros((len(parts[0].hidden), text.max_length, text.width), np.float32)
    row = column = block = 0
    for facts, part in zip(text.encoders.values(), parts, strict=True):
        tokens, width = part.hidden.shape[1:]
        if facts.joins == "sequence":
            row, column = row + block, 0
        hidden[:, row : row + tokens, column : column + width] = part.hidden
        column, block = column + width, tokens
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Embeddings(hidden, np.concatenate(pooled, axis=1) if pooled else None)


def merged(dropped: Iterable[tuple[str, DroppedText]]) -> tuple[DroppedText, ...]:
    """Pairs of an encoder and what it dropped, as one entry for all encoders that dropped the same."""
    encoders: dict[DroppedText, list[str]] = {}
    for encoder, cut in dropped:
        encoders.setdefault(cut, []).append(encoder)
    return tuple(replace(cut, encoders=tuple(dict.fromkeys(names))) for cut, names in encoders.items())
