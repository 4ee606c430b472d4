"""The files of a report: JSON, Markdown and a page."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from tandemrt.runtime.errors import BenchmarkError

from ..figures import write_text
from .markdown import markdown
from .page import page
from .schema import Report, write_report_json

NAMES = ("report.json", "report.md", "report.html")


def require_free(folder: Path, *, force: bool) -> None:
    """Check, before anything is measured, that a report can be written to a folder; nothing is left there.

    Raises:
        BenchmarkError: it cannot be made or written, holds a report and `force` is not given, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(str(folder), "is no folder", remedy="Give another --out.")
    taken = [name for name in NAMES if (folder / name).exists()]
    if taken and not force:
        raise BenchmarkError(
            str(folder / taken[0]), "exists already", remedy="Give another --out, or --force to replace it."
        )
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


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
        raise _cannot_be_written(folder, error) from error
    return paths


def _cannot_be_written(folder: Path, error: OSError) -> BenchmarkError:
    return BenchmarkError(str(folder), f"cannot be written ({error.strerror})", remedy="Give another --out.")
