"""The tokens that servers want to see, in variables of the environment and in files."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ArgumentError

LEAST_CHARACTERS = 16


def token_in_environment(variable: str) -> str | None:
    """The token in a variable; None where it is empty or not set. ArgumentError: it is no token."""
    token = os.environ.get(variable, "")
    return _usable(f"${variable}", token) if token else None


def token_in_file(where: str, file: Path) -> str:
    """The token in a file; ArgumentError, which begins with `where`, if it cannot be read or holds none."""
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ArgumentError(where, f"cannot be read ({error})") from error
    if not token:
        raise ArgumentError(where, "is empty")
    return _usable(where, token)


def _usable(where: str, token: str) -> str:
    if not (token.isascii() and token.isprintable() and len(token) >= LEAST_CHARACTERS):
        expected = f"{LEAST_CHARACTERS} or more ASCII characters that can be printed"
        raise ArgumentError(where, "is no token", expected=expected)
    return token
