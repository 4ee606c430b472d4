"""`tandemrt demo`: export the trained shapes family, paint it in four ways, and say what each costs and gets right."""

from __future__ import annotations

import argparse
import importlib.util
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tandemrt.runtime.cli.reporter import Reporter
from tandemrt.runtime.errors import ArgumentError, TandemError
from tandemrt.runtime.images import save_png

from .figures import markdown_table, write_json, write_text
from .machine import described, machine_facts

DEFAULT_PROMPTS = 120
SHEET_ROWS = 6
TITLE = "A large and a small model painting in tandem"

_PAINTING = {"onnxruntime": "cpu", "scipy": "bench"}
_EXPORTING = dict.fromkeys(("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript"), "export")


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What to do.

    output_dir: where bundle, sheet and tables go. prompts: how many are scored.
    bundle: one that is there already, to paint with instead of exporting.
    """

    output_dir: Path
    prompts: int = DEFAULT_PROMPTS
    bundle: Path | None = None

    def __post_init__(self) -> None:
        if self.prompts < SHEET_ROWS:
            raise ArgumentError(
                "--prompts", "number of prompts", got=self.prompts, expected=f"{SHEET_ROWS} or more, for the sheet"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Export the small trained models that come along, paint held-out prompts with the large model, the large and "
        "the small one in tandem, the small one, and a one-step model, and write contact-sheet.png, table.json and "
        "table.md. A second run uses the bundle again."
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", default=Path("out"), help="where everything goes (default: out)"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        default=DEFAULT_PROMPTS,
        help="how many held-out prompts to score (default: %(default)s)",
    )
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="a shapes bundle to paint with, instead of exporting one"
    )


def plan_from_arguments(namespace: argparse.Namespace) -> DemoPlan:
    return DemoPlan(namespace.output_dir, namespace.prompts, namespace.bundle)


def run(plan: DemoPlan, reporter: Reporter) -> dict[str, Any]:
    """Do it all; returns what the table holds and where the files are.

    Raises:
        TandemError: a package is missing, the folder cannot be written, or export or painting failed.
    """
    require_packages(_PAINTING if plan.bundle is not None else {**_PAINTING, **_EXPORTING})
    # Only now: these need the packages just looked for.
    from .showcase import paint_and_score  # noqa: PLC0415

    _require_writable(plan.output_dir)
    machine = machine_facts()
    bundle = plan.bundle
    if bundle is None:
        from .shapes.bundle import ensure_bundle  # noqa: PLC0415

        bundle = ensure_bundle(plan.output_dir / "shapes-bundle", reporter.progress)
    rows, image = paint_and_score(bundle, plan.prompts, reporter.progress)
    sheet, table = plan.output_dir / "contact-sheet.png", plan.output_dir / "table.json"
    files = {"bundle": str(bundle), "contact_sheet": str(sheet), "table": str(table)}
    facts = {"machine": machine, "prompts": plan.prompts, "columns": rows, "files": files}
    try:
        save_png(image, sheet, {})
        write_json(table, facts)
        write_text(table.with_suffix(".md"), markdown(facts))
    except OSError as error:
        raise TandemError(str(plan.output_dir), f"cannot be written ({error.strerror or error})") from error
    return facts


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The table and the files, as lines of text."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{TITLE}: {result['prompts']} held-out prompts")
    heads = ("", "", "time per picture", "all right (95% interval)", "denoisers, parameters", "MB")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < 2 else "right")
    for row in result["columns"]:
        table.add_row(row["name"], row["meaning"], *_cells(row))
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    yield from (line.rstrip() for line in text.getvalue().splitlines())
    yield f"pictures: {result['files']['contact_sheet']}"
    yield f"figures:  {result['files']['table']}"
    yield f"bundle:   {result['files']['bundle']}"
    example = f'{result["files"]["bundle"]} --prompt "a red circle left of a blue square" --steps 10,15 --seed 7'
    program = "tandemrt" if shutil.which("tandemrt") else Path(sys.executable).with_name("tandemrt")
    yield f"paint:    {program} generate {example}"


def markdown(facts: Mapping[str, Any]) -> str:
    """The table as Markdown, with what it was measured on."""
    heads = ("", "time per picture", "all attributes right", "denoisers, parameters", "MB")
    rows = [(f"{row['name']}: {row['meaning']}", *_cells(row)) for row in facts["columns"]]
    note = (
        f"{facts['prompts']} held-out prompts, in brackets the 95% Wilson interval; times are medians of "
        f"{SHEET_ROWS} pictures painted one by one, text and decoder included. {described(facts['machine'])}\n"
    )
    return f"{markdown_table(heads, rows)}\n{note}"


def require_packages(packages: Mapping[str, str]) -> None:
    """Raise TandemError naming every package that cannot be found and the extras that bring it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(packages[name] for name in missing))
        raise TandemError(
            "demo",
            "packages that are not installed",
            got=", ".join(missing),
            remedy=f'Run `pip install "tandemrt[{extras}]"`.',
        )


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    right = row["all_right"]
    accuracy = f"{right['share']:.2f} ({right['low']:.2f}–{right['high']:.2f})"
    return f"{row['median_ms']:.0f} ms", accuracy, f"{row['parameters']:,}", f"{row['megabytes']:.1f}"


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(
            "--output-dir", f"cannot be written ({error.strerror or error})", got=str(folder), remedy="Choose another."
        ) from error
