"""Whether peers that do the same work paint the same picture: of other weights they do not, however they are timed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from .peer_table import PEERS
from .rounds import Taken

# The same weights and solver come nearer: in the reports of docs/report, with the first contender in bf16, 37 to 49 dB.
LEAST_DB, LEAST_HALF_DB = 35.0, 30.0
_NARROW = re.compile("16|int8|int4")


def other_pictures(taken: Mapping[str, Taken]) -> Iterator[str]:
    """Peers whose pictures are too far from the first contender's, a sentence each.

    One that told that it does something otherwise, such as another solver, is left out: that is told already.
    """
    first = next(iter(taken))
    for name, one in taken.items():
        if name not in PEERS or not one.psnr_db or one.opened is None or one.opened.words.get("otherwise"):
            continue
        narrow = any(_NARROW.search(f"{who} {_precision(taken[who])}") for who in (first, name))
        distance = float(np.median(one.psnr_db))
        if distance < (LEAST_HALF_DB if narrow else LEAST_DB):
            yield f"{name} paints another picture than {first} ({distance:.1f} dB): are its weights the bundle's?"


def _precision(taken: Taken) -> str:
    return "" if taken.opened is None else taken.opened.words.get("precision", "")
