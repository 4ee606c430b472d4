"""What a server takes on, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from tandemrt.runtime.manifest import Manifest

# How long a body may take to come, in seconds, where a request may take longer.
BODY_S = 60.0
# No solver keeps more of earlier predictions than this.
MOST_HISTORY = 4
# What a body has besides tensors: a prompt, escaped.
_TEXTS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server and of one request to it.

    waiting: how many requests may wait beside those that run; running: how many run at once.
    batch: how many pictures those have together that wait and then run as one. 1 keeps them apart: models make other
        last bits of other batches.
    seconds: the longest a request may take, waiting included. prompt_bytes: of all its texts together, in UTF-8.
    """

    running: int = 1
    waiting: int = 16
    batch: int = 1
    seconds: float = 600.0
    header_bytes: int = 64 << 10
    prompt_bytes: int = 16 << 10
    steps: int = 150
    pictures: int = 4
    pixels: int = 1024 * 1024

    def body_bytes(self, manifest: Manifest) -> int:
        """The longest body of a request: that of the largest state and embeddings of a bundle that are allowed."""
        latent, text = manifest.latent, manifest.text
        state = (1 + MOST_HISTORY) * latent.channels * self.pixels // latent.downsampling**2
        embeddings = 2 * (text.max_length * text.width + text.pooled_width)
        return 4 * self.pictures * (state + embeddings) + _TEXTS_BYTES
