"""The files of a report: JSON, Markdown and a page."""

from __future__ import annotations

from pathlib import Path

from tandemrt.runtime.errors import BenchmarkError

from ..figures import write_text
from .markdown import markdown
from .page import page
from .schema import Report, write_report_json

NAMES = ("report.json", "report.md", "report.html")


def require_free(folder: Path, *, force: bool) -> None:
    """Check, before anything is measured, that a report may be written to a folder.

    Raises:
        BenchmarkError: it holds one and `force` is not given, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(str(folder), "is no folder", remedy="Give another --out.")
    taken = [name for name in NAMES if (folder / name).exists()]
    if taken and not force:
        raise BenchmarkError(
            str(folder / taken[0]), "exists already", remedy="Give another --out, or --force to replace it."
        )


def write_report_files(folder: Path, report: Report) -> tuple[Path, ...]:
    """Write all three, each whole or not at all, and return their paths.

    Raises:
        ValueError: a figure is NaN or infinite.
        BenchmarkError: the folder cannot be written or is full.
    """
    paths = tuple(folder / name for name in NAMES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_report_json(paths[0], report)
        write_text(paths[1], markdown(report))
        write_text(paths[2], page(report))
    except OSError as error:
        raise BenchmarkError(
            str(folder), f"cannot be written ({error.strerror})", remedy="Give another --out."
        ) from error
    return paths
