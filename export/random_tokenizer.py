"""Tokenizers in the files their authors publish, with vocabularies made of letters in place of learnt ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import ByteLevel

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_LETTERS = ascii_lowercase + digits
_T5_PAD, _T5_EOS, _T5_UNKNOWN = "<pad>", "</s>", "<unk>"
# T5's checkpoints: 32,000 pieces, then the sentinels in falling order; rows of the embedding past them are unused.
_T5_PIECES, _T5_SENTINELS = 32_000, 100
_T5_LENGTH = 512
_SPACE = "▁"


def write_tokenizer(folder: Path, size: int, length: int, pad_token: str = _EOS) -> None:
    """Write a byte-pair encoding of `size` tokens in CLIP's files; its merges are of letters, in alphabetical order.

    `pad_token` is a token of the vocabulary: CLIP pads with `<|endoftext|>`, OpenCLIP with `!`, which is id 0.
    """
    alphabet = sorted(ByteLevel.alphabet())
    single = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    ends = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    pairs = product(_LETTERS, ends)
    triples = ((first + second, last) for first, second, last in product(_LETTERS, _LETTERS, ends))
    merges = list(islice(chain(pairs, triples), size - len(single) - 2))
    tokens = [*single, *map("".join, merges), _BOS, _EOS]
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _EOS, "pad_token": pad_token}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    write_json(folder / "tokenizer_config.json", settings)


def write_t5_tokenizer(folder: Path) -> None:
    """Write a unigram model of 32,100 pieces in T5's files: `<pad>` is id 0, `</s>` 1, `<unk>` 2, sentinels last.

    Pieces are letters and runs of them, with and without the mark of a word's start; longer ones win.
    """
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(_T5_SENTINELS))]
    special = [_T5_PAD, _T5_EOS, _T5_UNKNOWN]
    pieces = list(islice(_pieces(), _T5_PIECES - len(special)))
    # The small term breaks ties, so that a text has one best segmentation whatever the order of search.
    scored = [(piece, -10.0 - len(piece) - rank / _T5_PIECES) for rank, piece in enumerate(pieces)]
    vocabulary = [*((token, 0.0) for token in special), *scored, *((token, 0.0) for token in sentinels)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=special.index(_T5_UNKNOWN), byte_fallback=False))
    metaspace = {"replacement": _SPACE, "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    end = (_T5_EOS, special.index(_T5_EOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_T5_EOS}", pair=f"$A {_T5_EOS} $B {_T5_EOS}", special_tokens=[end]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*special, *sentinels)])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    named = {"eos_token": _T5_EOS, "unk_token": _T5_UNKNOWN, "pad_token": _T5_PAD}
    extra = {"additional_special_tokens": list(reversed(sentinels))}
    write_json(folder / "special_tokens_map.json", {**named, **extra})
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": _T5_LENGTH, "extra_ids": _T5_SENTINELS}
    write_json(folder / "tokenizer_config.json", {**settings, **named, **extra})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as the files of a checkpoint have it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pieces() -> Iterator[str]:
    """Pieces without end of use: the space mark, characters, then runs of two, three and four letters."""
    yield _SPACE
    accented = "".join(map(chr, range(0xA1, 0x180)))
    yield from (*ascii_lowercase, *ascii_lowercase.upper(), *digits, *punctuation, *accented)
    for length in range(1, 4):
        for letters in product(_LETTERS, repeat=length):
            run = "".join(letters)
            yield _SPACE + run
            if length > 1:
                yield run
