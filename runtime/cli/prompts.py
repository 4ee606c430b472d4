"""The prompts of a run, from the command line and from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ArgumentError, RequestError


def gathered_prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts given, then those of the file.

    Raises:
        ArgumentError: the file cannot be read, or is not UTF-8.
        RequestError: there is no prompt at all, or one holds bytes that are no text.
    """
    prompts = (*given, *(() if file is None else prompts_from_file(file)))
    if not prompts and file is not None:
        raise RequestError(f"--prompts-file {file}", "holds no prompt", expected="one prompt a line")
    if not prompts:
        raise RequestError("--prompt", "no prompt given", remedy="Give --prompt TEXT or --prompts-file FILE.")
    for prompt in given:
        require_text("--prompt", prompt)
    return prompts


def prompts_from_file(path: Path) -> tuple[str, ...]:
    """One prompt a line, UTF-8 with or without a byte order mark; blank lines are skipped.

    Raises:
        ArgumentError: the file cannot be read, or is not UTF-8; the message names line and byte.
    """
    lines = read_text(f"--prompts-file {path}", path, "Check the path, or give --prompt TEXT.").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def read_text(where: str, path: Path, remedy: str) -> str:
    """A UTF-8 file of prompts without its byte order mark; `where` names it, `remedy` helps where it cannot be read.

    Raises:
        ArgumentError: it cannot be read, or is not UTF-8; the message names line and byte.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        what, expected = f"cannot be read ({error.strerror})", "a text file with one prompt a line"
        raise ArgumentError(where, what, expected=expected, remedy=remedy) from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ArgumentError(
            where,
            f"not UTF-8 at line {line}, byte {error.start}",
            got=raw[error.start : error.start + 4],
            expected="UTF-8 text",
            remedy="Save the file as UTF-8.",
        ) from error
    return text.removeprefix("\ufeff")


def require_text(where: str, value: str) -> None:
    """Refuse what a shell passed on although it is no text in the terminal's encoding.

    Raises:
        RequestError: `value` holds lone surrogates.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(where, f"not text at character {error.start}", got=value, expected="valid UTF-8") from error
