"""What a figure was measured on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tandemrt.bench.machine import commit_of


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_clones_commit_is_told_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "file").write_text("1", encoding="utf-8")
    assert commit_of(tmp_path) is None
    git("init")
    assert commit_of(tmp_path) is None
    git("add", "file")
    git("commit", "--no-gpg-sign", "-m", "one")
    assert commit_of(tmp_path) == git("rev-parse", "--short", "HEAD")
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert commit_of(tmp_path) == f"{git('rev-parse', '--short', 'HEAD')}-dirty"
