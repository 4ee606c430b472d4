"""Prompts to the embeddings a denoiser reads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .backends.base import Binding, Session
from .bundle import Bundle
from .errors import BundleError, ExecutionError
from .tokenizer import DroppedText, PromptTokenizer, Tokens

__all__ = ["DroppedText", "PromptEncoder", "Tokens"]

CACHED_PROMPTS = 64

Float32 = npt.NDArray[np.float32]


class PromptEncoder:
    """A bundle's tokenizer and text encoder, with the latest embeddings kept; safe to share between threads.

    The cache is keyed by token ids, which decide the embedding: prompts that differ only in case share one. Each
    prompt runs alone, because a batch of another size may change the last bits; so a hit equals a fresh run.
    """

    def __init__(self, bundle: Bundle, session: Session, *, cached_prompts: int = CACHED_PROMPTS) -> None:
        """Load the tokenizer; `session` is the open text encoder, which stays the caller's to close.

        cached_prompts: how many embeddings are kept at most, 0 or more.

        Raises:
            BundleError: the tokenizer cannot be used, or the text encoder's outputs are not what the manifest says.
        """
        encoders = bundle.manifest.text.encoders
        if len(encoders) != 1:
            raise BundleError(str(bundle.path), "text encoders", got=list(encoders), expected="one")
        (facts,) = encoders.values()
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path, facts.max_length)
        self._session = session
        self._shape = (facts.max_length, facts.width)
        self._cached_prompts = cached_prompts
        self._cache: OrderedDict[bytes, Float32] = OrderedDict()
        self._binding: Binding | None = None
        self._lock = threading.Lock()

    def tokenize(self, prompts: Sequence[str], *, strict: bool = False) -> Tokens:
        """As `PromptTokenizer.tokenize`."""
        return self._tokenizer.tokenize(prompts, strict=strict)

    def encode(self, prompts: Sequence[str], *, strict: bool = False) -> tuple[Float32, tuple[DroppedText, ...]]:
        """The embeddings of prompts, (B, max_length, width) float32, and the text that was dropped.

        Raises:
            RequestError: as `tokenize`.
            ExecutionError: the text encoder failed, or returned NaN or Inf.
        """
        tokens = self.tokenize(prompts, strict=strict)
        return np.stack([self._embedding(ids) for ids in tokens.ids]), tokens.dropped

    def _embedding(self, ids: npt.NDArray[np.int64]) -> Float32:
        key = ids.tobytes()
        with self._lock:
            embedding = self._cache.pop(key, None)
            if embedding is None:
                embedding = self._computed(ids)
            self._cache[key] = embedding
            while len(self._cache) > self._cached_prompts:
                self._cache.popitem(last=False)
            return embedding

    def _computed(self, ids: npt.NDArray[np.int64]) -> Float32:
        if self._binding is None:
            self._binding = self._session.bind({"input_ids": (1, len(ids))})
        binding = self._binding
        binding.inputs["input_ids"][0] = ids
        binding.run()
        output = binding.outputs.get("last_hidden_state")
        if output is None or output.shape != (1, *self._shape):
            got = {name: array.shape for name, array in binding.outputs.items()}
            raise BundleError("text_encoder", "outputs", got=got, expected=f"last_hidden_state {(1, *self._shape)}")
        if not np.isfinite(output).all():
            raise ExecutionError("text_encoder", "NaN or Inf in last_hidden_state", expected="finite values")
        # astype copies: the next run overwrites the output.
        embedding: Float32 = output[0].astype(np.float32)
        return embedding
