"""What a server takes on, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass


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
    body_bytes: int = 4 << 20
    header_bytes: int = 64 << 10
    prompt_bytes: int = 16 << 10
    steps: int = 150
    pictures: int = 4
    pixels: int = 1024 * 1024
