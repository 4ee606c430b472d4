"""Which files hold a model's weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..runtime.errors import CheckpointError
from .foreign_graph import find_graph
from .pickled import PICKLES, read_pickled, refused
from .shards import read_shards
from .weights import Weights, read_header

# transformers names pickled weights otherwise than safe ones.
_PICKLED_STEMS = {"model": "pytorch_model"}


def find_weights(folder: Path, stem: str, *, allow_pickle: bool = False) -> Weights:
    """The weights called `stem` in a model folder, their headers read and checked.

    One safetensors file or several with an index; without either, those of the one variant there is, such as fp16; an
    ONNX graph where there are none.
    allow_pickle: take pickled weights where there are no safe ones; see `read_pickled`.

    Raises:
        CheckpointError: no weights, several variants of them, pickled ones without `allow_pickle`, or damaged ones.
    """
    found = _find(folder, stem, "safetensors", read_header)
    if found is None and allow_pickle:
        found = _find(folder, _PICKLED_STEMS.get(stem, stem), "bin", read_pickled)
    if found is None:
        found = find_graph(folder)
    if found is not None:
        return found
    expected = f"{stem}.safetensors"
    pickled = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    if pickled and not allow_pickle:
        raise refused(pickled[0], expected)
    raise CheckpointError(str(folder), "no weights", expected=expected, remedy="Download the checkpoint again.")


def read_weights(path: Path, *, allow_pickle: bool = False) -> Weights:
    """The weights in one file, its header read and checked.

    allow_pickle: take a pickled one; see `read_pickled`.

    Raises:
        CheckpointError: pickled without `allow_pickle`, or damaged.
    """
    if not any(map(path.match, PICKLES)):
        return read_header(path)
    if not allow_pickle:
        raise refused(path, "a .safetensors file")
    return read_pickled(path)


def _find(folder: Path, stem: str, suffix: str, read: Callable[[Path], Weights]) -> Weights | None:
    index = f"{stem}.{suffix}.index"
    if (folder / f"{stem}.{suffix}").is_file():
        return read(folder / f"{stem}.{suffix}")
    if (folder / f"{index}.json").is_file():
        return read_shards(folder / f"{index}.json", read)
    single = _variants(folder, f"{stem}.", f".{suffix}")
    sharded = _variants(folder, f"{index}.", ".json")
    variants = sorted(single.keys() | sharded)
    if len(variants) > 1:
        raise CheckpointError(
            str(folder),
            "several variants of the weights",
            got=", ".join(variants),
            expected=f"{stem}.{suffix}, or one variant",
            remedy="Keep one of them, under the name without its variant.",
        )
    if not variants:
        return None
    return read(single[variants[0]]) if single else read_shards(sharded[variants[0]], read)


def _variants(folder: Path, head: str, tail: str) -> dict[str, Path]:
    """Files by the one word between `head` and `tail` of their names."""
    name = re.compile(f"{re.escape(head)}([A-Za-z0-9_]+){re.escape(tail)}")
    found = {match[1]: path for path in folder.iterdir() if (match := name.fullmatch(path.name)) and path.is_file()}
    return dict(sorted(found.items()))
