"""`scripts/readme-tables`: measured figures in the documents are those of their evidence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from tandemrt.bench.reports.files import write_report_files
from tandemrt.bench.reports.schema import write_report_json
from tandemrt.runtime.errors import BenchmarkError

from .bench.reports.sample import OURS, report

ROOT = Path(__file__).resolve().parent.parent
EXPORT = "<!-- bench/evidence/export.json | 1 | sd15 unet"
HOST = "<!-- bench/evidence/host.json"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = loaded()


def written(text: str, root: Path = ROOT, folder: Path | None = None) -> str:
    document = (folder or root) / "document.md"
    document.write_text(text, encoding="utf-8")
    made: str = TABLES.written(document, root)
    return made


def stale(root: Path = ROOT) -> list[str]:
    """What is not as its evidence says, and `scripts/readme-tables` would write."""
    return [str(path.relative_to(root)) for path, text in TABLES.made(root) if not TABLES.is_made(path, text)]


def test_documents_and_reports_are_what_their_evidence_says() -> None:
    assert stale() == []


def test_a_reports_other_files_are_made_of_its_json(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    folder = tmp_path / "docs" / "report" / "one"
    _, markdown, page = write_report_files(folder, report())
    assert stale(tmp_path) == []
    markdown.write_text(markdown.read_text(encoding="utf-8").replace("2.00", "1.00"), encoding="utf-8")
    page.unlink()
    assert stale(tmp_path) == ["docs/report/one/report.md", "docs/report/one/report.html"]


def test_a_changed_figure_is_written_anew(tmp_path: Path) -> None:
    text = f"at {EXPORT} | fp16 | peak, GiB -->3.4<!-- end --> GiB, in fp32 {EXPORT} | fp32 | peak, GiB --><!-- end -->"
    right = text.replace("3.4", "3.5").replace("--><!--", "-->5.8<!--")
    assert written(text, folder=tmp_path) == right
    assert written(right, folder=tmp_path) == right


def test_reports_are_shown_by_section_and_all_together(tmp_path: Path) -> None:
    source = "<!-- docs/report/{}/report.json | pictures -->\n<!-- end -->\n"
    folder = tmp_path / "docs" / "report"
    for sections, name in ((report().sections, "one"), ((), "another")):
        write_report_json(folder / name / "report.json", msgspec.structs.replace(report(), sections=sections))
    section = written(source.format("one"), tmp_path)
    assert f"\n| {OURS} | 1.00 | 1.01 | 1.01 | 1.00 (1.00–1.00) |\n" in section
    together = written(source.format("*"), tmp_path)
    assert f"\n| [bundle, 10,15](docs/report/one/report.md): {OURS} |  | 1.00 (0.990–1.01) |  |  |  |  |\n" in together
    assert "](docs/report/one/report.md): diffusers |  | 2.00 (1.98–2.02) | 2.00 (2.00–2.00) |  |  |  |\n" in together
    assert "\n| [bundle, 10,15](docs/report/one/report.md): optimum |  | not measured |  |  |  |  |\n" in together
    assert together.endswith(" A processor, 2 cores.\n\n<!-- end -->\n")
    assert written(together, tmp_path) == together


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{EXPORT} | peak, GiB --><!-- end -->", "rows that begin so, got '2 of sd15 unet', expected one"),
        (f"{EXPORT} | fp16 | peak --><!-- end -->", "does not have it, got 'peak', expected one of preset, component"),
        (f"{HOST} | 9 --><!-- end -->", "host.json: does not have it, got '9', expected one of 1, 2"),
        (
            "<!-- docs/report/no*/report.json | pictures -->\n<!-- end -->",
            "no report there has this section, got 'pict",
        ),
        (f"{HOST} | 1 -->\n", "document.md: a region has no beginning, or no end"),
        (f"{HOST} | 1 -->\n{HOST} | 1 -->\n<!-- end -->", "a region of bench/evidence/host.json has no end"),
    ],
)
def test_regions_that_cannot_be_written_are_told(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError) as raised:
        written(text, folder=tmp_path)
    assert told in str(raised.value)
