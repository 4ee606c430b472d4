"""What a server takes on, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.manifest import Manifest

# How long a body may take to come, in seconds, where a request may take longer.
BODY_S = 60.0
# A call of a model cannot be stopped: it hangs where it ends so many seconds later than it may.
HANGS_S = 60.0
# No solver keeps more of earlier predictions than this.
MOST_HISTORY = 4
# What a body has besides tensors: a prompt, escaped.
_TEXTS_BYTES = 1 << 20
# The least that bounds other than 1 may be.
_LEAST = {"waiting": 0, "seconds": 0.001}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server and of one request to it.

    waiting: how many requests may wait beside those that run; running: how many run at once.
    batch: how many pictures those have together that wait and then run as one. 1 keeps them apart: models make other
        last bits of other batches.
    seconds: the longest a request may take, waiting included. prompt_bytes: of all its texts together, in UTF-8.

    Raises:
        ArgumentError: one is out of range; it names the field.
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

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value, least = getattr(self, name), _LEAST.get(name, 1)
            if not least <= value < 1e9:
                raise ArgumentError(name, "not usable", got=value, expected=f"{least} or more, and less than 1e9")

    def body_bytes(self, manifest: Manifest) -> int:
        """The longest body of a request: that of the largest state and embeddings of a bundle that are allowed."""
        latent, text = manifest.latent, manifest.text
        state = (1 + MOST_HISTORY) * latent.channels * self.pixels // latent.downsampling**2
        embeddings = 2 * (text.max_length * text.width + text.pooled_width)
        return 4 * self.pictures * (state + embeddings) + _TEXTS_BYTES
