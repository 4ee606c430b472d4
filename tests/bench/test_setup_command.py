"""`tandemrt bench setup`, with a folder of wheels in the package registry's place."""

from __future__ import annotations

import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tandemrt.bench.peer_table import PEERS, interpreter
from tandemrt.runtime.cli import main

INFO = "tiny_peer-1.0.dist-info"
FILES = {
    "tiny_peer.py": "SAYS = 'here'\n",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.0\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/RECORD": "",
}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one wheel, of the only package that the peer `optimum` needs; nothing else is asked by pip."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_peer-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    monkeypatch.setitem(PEERS, "optimum", replace(PEERS["optimum"], requirements=("tiny-peer==1.0",)))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_peer_is_installed_from_the_wheels_that_were_downloaded(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    setup = ["bench", "setup", "optimum", "diffusers", "--cache", str(cache)]
    assert main([*setup, "--download", str(wheels)]) == 0
    assert [path.name for path in wheels.iterdir()] == ["tiny_peer-1.0-py3-none-any.whl"]
    assert not cache.exists()
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert main([*setup, "--find-links", str(wheels)]) == 0
    command = [interpreter("optimum", cache), "-c", "import tiny_peer; print(tiny_peer.SAYS)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "here\n"


def test_what_cannot_be_downloaded_is_told(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(registry.iterdir()).unlink()
    assert main(["bench", "setup", "optimum", "--download", str(tmp_path / "wheels")]) == 1
    told = capsys.readouterr().err
    assert "optimum: cannot be installed" in told and "No matching distribution found for tiny-peer==1.0" in told
