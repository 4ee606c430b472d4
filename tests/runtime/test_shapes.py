"""Formulas of symbolic dimensions."""

from __future__ import annotations

import pytest

from tandemrt.runtime.shapes import evaluated

SIZES = {"batch": 2, "height": 9, "width": 16, "s0 + 1": 5}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        (7, 7),
        ("7", 7),
        ("height", 9),
        ("8*height", 72),
        ("8 * height", 72),
        ("height // 2", 4),
        ("(height - 1)//2 + 1", 5),
        ("2*batch*(width - 3)", 52),
        ("s0 + 1", 5),
        (" width ", 16),
    ],
)
def test_formulas_are_computed(formula: int | str, value: int) -> None:
    assert evaluated(("batch", formula), SIZES) == (2, value)


@pytest.mark.parametrize(
    "formula",
    ["", "unknown", "height / 2", "height ** 99", "height // 0", "Min(height, 3)", "2.5", "True", "height; 1", "8*",
     "\0", "(" * 101, "-" * 5000 + "1", "height if 1 else 2", "__import__('os')"],
)  # fmt: skip
def test_what_is_not_understood_is_not_guessed(formula: str) -> None:
    assert evaluated(("batch", formula), SIZES) is None
