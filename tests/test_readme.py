"""The README's examples run, and its commands and files exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tandemrt.runtime.cli import main
from tandemrt.runtime.cli.program import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
REPORTS = ROOT / "docs" / "report"
INDEX = (REPORTS / "README.md").read_text(encoding="utf-8")
COMMAND_LINES = [
    line.removeprefix(".venv/bin/")
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.startswith(("tandemrt ", ".venv/bin/tandemrt "))
]
MEASURED_BY = re.findall(r"`(tandemrt [^`]+)`", INDEX)


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(code: str, shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shapes_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    with Image.open("out.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize("line", [*COMMAND_LINES, *MEASURED_BY])
def test_commands_have_the_options_shown(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *rest = shlex.split(line, comments=True)
    assert main([name, *(rest[:1] if COMMANDS[name].group else ()), "--help"]) == 0
    offered = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]*", line)) <= offered


def test_every_command_is_shown() -> None:
    assert {shlex.split(line, comments=True)[1] for line in COMMAND_LINES} == set(COMMANDS)


def test_generate_example_runs(shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shapes_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    line = next(line for line in COMMAND_LINES if line.startswith("tandemrt generate bundle "))
    assert main(shlex.split(line)[1:]) == 0
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_links_lead_to_files() -> None:
    for folder, text in ((ROOT, TEXT), (REPORTS, INDEX)):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        assert targets
        assert [target for target in targets if not (folder / target).exists()] == []


def test_reports_are_shown_with_what_made_them() -> None:
    for path in REPORTS.glob("*/report.json"):
        assert f"]({path.parent.name}/report.md)" in INDEX
        assert any(line.endswith(f"--out docs/report/{path.parent.name}") for line in MEASURED_BY)


def test_evidence_says_how_it_was_made() -> None:
    folder = ROOT / "bench" / "evidence"
    told = (folder / "README.md").read_text(encoding="utf-8")
    assert [path.stem for path in folder.glob("*.json") if f"`{path.stem}`" not in told] == []
