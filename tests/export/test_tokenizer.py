"""`tokenizer.json`, read by the tokenizers library alone, against transformers' CLIPTokenizer."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tandemrt.export.tokenizer import TOKENIZER_JSON, export_tokenizer, load_clip_tokenizer
from tandemrt.runtime.errors import CheckpointError

from .mini import TEXT_LENGTH, TOKENIZER, edit_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    assert export_tokenizer(TOKENIZER, folder, longest=77, vocabulary=592) == TEXT_LENGTH
    return Tokenizer.from_file(str(folder / TOKENIZER_JSON)), load_clip_tokenizer(TOKENIZER)


@given(TEXT)
@example("A RED CIRCLE Left Of a BLUE square")
@example("a red circle " * 30)
@example("<|endoftext|>x<|startoftext|>")
@example("İstanbul ǅ ß ﬁ e\u0301 \u3000 \x00")
@settings(max_examples=150)
def test_ids_are_those_of_clip_tokenizer(both: tuple[Tokenizer, Any], text: str) -> None:
    alone, reference = both
    expected = reference(text, padding="max_length", max_length=TEXT_LENGTH, truncation=True).input_ids
    assert alone.encode(text).ids == expected


def test_the_whole_prompt_can_be_had_without_truncation(both: tuple[Tokenizer, Any]) -> None:
    alone, reference = both
    alone = Tokenizer.from_str(alone.to_str())
    alone.no_truncation()
    alone.no_padding()
    text = "a red circle " * 30
    assert alone.encode(text).ids == reference(text).input_ids


def test_the_length_is_bounded_by_the_text_encoder(tmp_path: Path) -> None:
    assert export_tokenizer(TOKENIZER, tmp_path / "tokenizer", longest=10, vocabulary=592) == 10
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer" / TOKENIZER_JSON)).encode("x " * 50).ids) == 10


def test_ids_the_text_encoder_has_no_place_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json: largest token id, got 591, expected below 500"):
        export_tokenizer(TOKENIZER, tmp_path / "tokenizer", longest=77, vocabulary=500)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer_config.json"])
def test_a_file_that_cannot_be_read_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self == TOKENIZER / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read \(Permission denied\)"):
        export_tokenizer(TOKENIZER, tmp_path / "tokenizer", longest=77, vocabulary=592)


@pytest.mark.parametrize("length", ["long", 2, math.nan, math.inf])
def test_a_length_that_makes_no_sense_is_refused(tmp_path: Path, own_checkpoint: Path, length: object) -> None:
    edit_json(own_checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(
        CheckpointError, match=rf"tokenizer_config\.json: model_max_length, got {length!r}, expected a fin"
    ):
        export_tokenizer(own_checkpoint / "tokenizer", tmp_path / "tokenizer", longest=77, vocabulary=592)
