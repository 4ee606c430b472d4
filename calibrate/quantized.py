"""What a quantizer did to a graph, whichever quantizer it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantizer's report, of facts that JSON can hold.

    layers: the nodes that are quantized, in the graph's order.
    kept: the nodes of the same kinds that were left in floating point.
    settings: how it was done, with what and on how many samples.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    settings: Mapping[str, Any]
