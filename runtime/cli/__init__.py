"""The command line: `tandemrt COMMAND ...`."""

from .program import main

__all__ = ["main"]
