"""Tokenizers of CLIP and T5 as one `tokenizer.json` that the tokenizers library reads alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, T5TokenizerFast

from ..runtime.errors import CheckpointError, ExportError
from ..runtime.safetensors_files import read_json
from .graph import quiet
from .samples import PROMPTS
from .weights import copy_source

TOKENIZER_JSON = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_OPTIONAL = ("special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class _Kind:
    """A kind of tokenizer: transformers' class, the files it is made of, and how errors call it."""

    loader: Any
    required: tuple[str, ...]
    name: str


_CLIP = _Kind(CLIPTokenizer, ("vocab.json", "merges.txt", _SETTINGS), "CLIP tokenizer")
_T5 = _Kind(T5TokenizerFast, (TOKENIZER_JSON, _SETTINGS), "T5 tokenizer")
# What a wrong normalizer, pre-tokenizer or post-processor would show on.
_PROBES = (
    *PROMPTS,
    "A RED Circle",
    "  two\t spaces\n",
    "it's 1234 cats' café naïve Ångström",
    "日本語 の 絵 🙂",
    "<|endoftext|> and <|startoftext|>",
    "word " * 200,
)


def export_tokenizer(source: Path, folder: Path, longest: int, vocabulary: int) -> int:
    """Copy a tokenizer's files to `folder`, add `tokenizer.json`, and return the length prompts are padded to.

    `tokenizer.json` pads and truncates to that length, so that reading it alone gives the ids of transformers' class.
    `longest` is how many positions the text encoder has, `vocabulary` how many tokens. CLIP's is known by its
    `vocab.json`; T5's needs its `tokenizer.json`.

    Raises:
        CheckpointError: a file is missing or unusable, or no sensible length is stated.
        ExportError: the ids differ from those of transformers' class.
    """
    kind = _T5 if (source / TOKENIZER_JSON).is_file() and not (source / "vocab.json").is_file() else _CLIP
    for name in kind.required:
        if not (source / name).is_file():
            raise CheckpointError(str(source / name), "missing", expected=f"{', '.join(kind.required)} in {source}")
    length = _stated_length(source / _SETTINGS, longest)
    folder.mkdir()
    for name in (*kind.required, *_OPTIONAL):
        if (source / name).is_file():
            copy_source(source / name, folder / name)
    reference = _loaded(kind, folder)
    if reference.pad_token is None:
        raise CheckpointError(str(source / _SETTINGS), "pad_token", got=None, expected="a token")
    alone = Tokenizer.from_str(reference.backend_tokenizer.to_str())
    largest = max(alone.get_vocab().values())
    if largest >= vocabulary:
        where = str(source / kind.required[0])
        raise CheckpointError(where, "largest token id", got=largest, expected=f"below {vocabulary}")
    alone.enable_truncation(length)
    alone.enable_padding(length=length, pad_id=reference.pad_token_id, pad_token=reference.pad_token)
    # Not `alone.save`: on a full disk it raises bare Exception, which says nothing of errno.
    (folder / TOKENIZER_JSON).write_text(alone.to_str(pretty=True), encoding="utf-8")
    _require_equal_ids(folder, reference, length)
    return length


def token_ids(folder: Path) -> npt.NDArray[np.int64]:
    """The ids of the sample prompts, (len(PROMPTS), length) int64, by `tokenizer.json` alone."""
    alone = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    return np.array([encoding.ids for encoding in alone.encode_batch(list(PROMPTS))], np.int64)


def load_clip_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer of a folder.

    Raises:
        CheckpointError: the folder's files do not make one.
    """
    return _loaded(_CLIP, folder)


def _loaded(kind: _Kind, folder: Path) -> Any:
    try:
        with quiet():
            return kind.loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged vocabulary
        raise CheckpointError(str(folder), f"not a {kind.name} ({error})", remedy="Download it again.") from error


def _stated_length(path: Path, longest: int) -> int:
    stated = read_json(path).get("model_max_length", longest)
    # A whole number is finite, however many digits it has; `isfinite` would overflow on it.
    finite = isinstance(stated, int) or (isinstance(stated, float) and math.isfinite(stated))
    if not finite or stated < 3:
        raise CheckpointError(str(path), "model_max_length", got=stated, expected="a finite number from 3 up")
    return int(min(stated, longest))


def _require_equal_ids(folder: Path, reference: Any, length: int) -> None:
    alone = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    for text in _PROBES:
        expected = reference(text, padding="max_length", max_length=length, truncation=True).input_ids
        if alone.encode(text).ids != expected:
            raise ExportError(
                str(folder.name),
                f"ids of {text[:40]!r} by {TOKENIZER_JSON}",
                got=alone.encode(text).ids,
                expected=str(expected),
            )
