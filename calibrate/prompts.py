"""Prompts to calibrate with or to be judged by, out of text files and tables of captions."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..runtime.arguments import did_you_mean
from ..runtime.cli.prompts import read_text
from ..runtime.errors import ArgumentError
from ..runtime.tokenizer import MAX_PROMPT_BYTES

MAX_PROMPTS = 100_000
COLUMNS = ("caption", "prompt", "text")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_prompts(path: str | Path, column: str | None = None, *, repeats: bool = False) -> tuple[str, ...]:
    """The prompts of a file in its order, each once: the first of those that differ in case and space alone.

    repeats: give those that come again too.

    A text file has one a line, blank ones do not count. A table, `.csv` or `.tsv` or whatever a `column` is named of,
    has a first row of names and one prompt a row, as COCO's captions have: in the column named, else in the first of
    `caption`, `prompt` and `text` that there is.

    Raises:
        ArgumentError: the file cannot be read, is not UTF-8, holds NUL, a prompt of over 64 KiB or none at all; or the
            table has no such column, or a row without it. The message names the line.
    """
    prompts: dict[str | int, str] = {}
    for line, prompt in _numbered(Path(path), column):
        prompts.setdefault(line if repeats else normalised(prompt), prompt)
    return tuple(prompts.values())


def prompt_lines(path: Path, column: str | None, prompts: Iterable[str]) -> tuple[tuple[int, ...], int]:
    """The line of a file that each of its prompts is on first, and how many more lines hold one of these again.

    Raises:
        ArgumentError: as `read_prompts`.
    """
    keys = list(map(normalised, prompts))
    wanted, lines, found = set(keys), dict[str, int](), 0
    for line, prompt in _numbered(path, column):
        if normalised(prompt) in wanted:
            lines.setdefault(normalised(prompt), line)
            found += 1
    return tuple(lines[key] for key in keys), found - len(lines)


def _numbered(path: Path, column: str | None) -> Iterator[tuple[int, str]]:
    """Every prompt of a file with the line that it ends in; see `read_prompts`."""
    where = str(path)
    text = read_text(where, path, "Check the path.")
    if "\0" in text:
        raise ArgumentError(
            f"{where}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}",
            "holds NUL",
            expected="text without it",
            remedy="It may be UTF-16, or no text at all: save it as UTF-8.",
        )
    delimiter = _DELIMITERS.get(path.suffix.lower(), None if column is None else ",")
    numbered = enumerate(text.split("\n"), 1) if delimiter is None else _cells(where, text, delimiter, column)
    there = False
    for line, cell in numbered:
        prompt = " ".join(cell.split())
        size = len(prompt.encode())
        if size > MAX_PROMPT_BYTES:
            expected = f"at most {MAX_PROMPT_BYTES} bytes"
            raise ArgumentError(f"{where}, line {line}", "a prompt that is too long", got=size, expected=expected)
        if prompt:
            there = True
            yield line, prompt
    if not there:
        expected = "one a line" if delimiter is None else "one a row below the columns' names"
        raise ArgumentError(where, "holds no prompt", expected=expected)


def chosen_prompts(
    path: Path, column: str | None, count: int | None, default: int | None, held_out: Path | None = None
) -> tuple[str, ...]:
    """The first `count` prompts of a file; without a count the first `default`, or as many as there are.

    column: of a table; of `held_out` too where both files are of one kind. held_out: has prompts, none of which may be
    chosen.

    Raises:
        ArgumentError: as `read_prompts`; there are fewer than `count`, or some are held out.
    """
    prompts = _first(path, column, "-n", count, default)
    if held_out is not None:
        require_apart(prompts, held_out_prompts(held_out, path, column))
    return prompts


def held_out_prompts(
    held_out: Path, path: Path, column: str | None, count: int | None = None, default: int | None = None
) -> tuple[str, ...]:
    """The prompts of a file that are held out of `path`; --judge says how many, otherwise as `chosen_prompts`."""
    column = column if held_out.suffix.lower() == path.suffix.lower() else None
    return _first(held_out, column, "--judge", count, default)


def _first(path: Path, column: str | None, option: str, count: int | None, default: int | None) -> tuple[str, ...]:
    every = read_prompts(path, column)
    if count is not None and len(every) < count:
        remedy = f"Give {option} {len(every)}, or more prompts."
        raise ArgumentError(str(path), "prompts", got=len(every), expected=f"{option} {count}", remedy=remedy)
    return every[: default if count is None else count]


def prompts_sha256(prompts: Iterable[str]) -> str:
    """The digest of prompts: that of a file of them, one a line."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


def require_apart(prompts: Iterable[str], held_out: Iterable[str]) -> None:
    """Refuse prompts that are held out too, in whatever case and space: what is found with them could not be judged.

    Raises:
        ArgumentError: there are some; the message has the first, and how many there are.
    """
    kept = set(map(normalised, held_out))
    both = [prompt for prompt in prompts if normalised(prompt) in kept]
    if both:
        what = f"held out and calibrated with: {len(both)} of them, the first is {both[0]!r}"
        raise ArgumentError("prompts", what, remedy="Take them out of one of the two files.")


def normalised(prompt: str) -> str:
    """What two prompts have in common that differ in case and space alone."""
    return " ".join(prompt.casefold().split())


def _cells(where: str, text: str, delimiter: str, column: str | None) -> Iterator[tuple[int, str]]:
    """A column of a table, each cell with the line that its row ends in."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        index = names.index(_column(where, names, column))
        for row in rows:
            if not any(row):
                continue
            if len(row) <= index:
                expected = f"{names[index]!r}, column {index + 1}"
                raise ArgumentError(f"{where}, line {rows.line_num}", "row", got=row, expected=expected)
            yield rows.line_num, row[index]
    except csv.Error as error:
        remedy = "Check its quotes."
        raise ArgumentError(f"{where}, line {rows.line_num}", f"not a table ({error})", remedy=remedy) from error


def _column(where: str, names: Sequence[str], column: str | None) -> str:
    """The name of the column that has the prompts."""
    if column is None:
        found = next((name for known in COLUMNS for name in names if name.lower() == known), None)
    else:
        found = column if column in names else None
    if found is None:
        expected = (
            f"a column {column!r}" if column is not None else f"a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        )
        remedy = did_you_mean(column, names) if column is not None else "Name the column that has the prompts."
        raise ArgumentError(f"{where}, line 1", "columns", got=", ".join(names), expected=expected, remedy=remedy)
    return found
