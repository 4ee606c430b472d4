"""The command line: `tandemrt COMMAND ...`."""

from .main import main

__all__ = ["main"]
