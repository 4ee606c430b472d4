"""Symbolic shapes: formulas of dimensions, as graphs state them, with numbers put in."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence

MAX_FORMULA_CHARACTERS = 100

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluated(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """A shape with its symbols replaced, or None where one is not known.

    Whole numbers, symbols, brackets and + - * // are understood, such as `8*height` or `(height - 1)//2 + 1`.
    """
    values = [size if isinstance(size, int) else _value(size, sizes) for size in shape]
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None


def _value(formula: str, sizes: Mapping[str, int]) -> int | None:
    if formula in sizes:
        return sizes[formula]
    # A graph may come from anywhere: what is long could nest deeper than the parser can go.
    if len(formula) > MAX_FORMULA_CHARACTERS:
        return None
    try:
        return _computed(ast.parse(formula.strip(), mode="eval").body, sizes)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def _computed(node: ast.expr, sizes: Mapping[str, int]) -> int:
    """Raises KeyError for what is not understood."""
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_computed(node.left, sizes), _computed(node.right, sizes))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    return sizes[ast.unparse(node)]
