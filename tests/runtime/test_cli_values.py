"""What the options of `tandemrt generate` may hold, and the names that are made of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.runtime.cli.pictures import slug
from tandemrt.runtime.cli.prompts import prompts_from_file
from tandemrt.runtime.cli.values import parse_settings, parse_size
from tandemrt.runtime.errors import ArgumentError, RequestError


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, left of a blue square", "a-red-circle-left-of-a-blue-square"),
        ("../../etc/passwd\x00", "etc-passwd"),
        ("红色的圆", "prompt"),
        ("x" * 100, "x" * 40),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_slugs_are_safe_file_names(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_settings_are_json_or_bare_words() -> None:
    pairs = ["a=true", "b=0.5", 'c="x y"', "d=trailing", "e=null", "f=[1, 2]"]
    assert parse_settings("--x", pairs) == {
        "a": True, "b": 0.5, "c": "x y", "d": "trailing", "e": None, "f": [1, 2]
    }  # fmt: skip


@pytest.mark.parametrize("pair", ["a", "=1", "a=True", "a=NaN", "a=", "a b=1"])
def test_other_settings_are_refused(pair: str) -> None:
    with pytest.raises(ArgumentError, match="--x"):
        parse_settings("--x", [pair])


def test_a_setting_twice_is_refused() -> None:
    with pytest.raises(ArgumentError, match="twice"):
        parse_settings("--x", ["a=1", "a=2"])


def test_sizes_are_width_by_height() -> None:
    assert parse_size("64") == (64, 64)
    assert parse_size("768x512") == (768, 512)
    with pytest.raises(RequestError, match="768x"):
        parse_size("768x")


def test_lines_of_a_prompts_file_end_at_newlines_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028still one\ntwo".encode())
    assert prompts_from_file(file) == ("one\u2028still one", "two")
