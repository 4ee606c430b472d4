"""The bench of bf16's angles runs on any bundle, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench.angles import main
from tandemrt.runtime.errors import TargetError

from ..runtime.test_backend_openvino import HAS_BF16
from ..runtime.tiny_bundle import write_tiny_bundle
from ..runtime.tiny_families import write_tiny_sdxl


def test_figures_of_denoisers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "plain")
    write_tiny_sdxl(tmp_path / "sizes")
    out = tmp_path / "figures.json"
    arguments = [str(tmp_path / "plain"), str(tmp_path / "sizes"), "--json", str(out)]
    if not HAS_BF16:
        with pytest.raises(TargetError, match="no instructions for the precision"):
            main(arguments)
        return
    main(arguments)
    figures = json.loads(out.read_text())["figures"]
    assert [one["bundle"] for one in figures] == ["plain", "sizes"]
    for one in figures:
        assert 0 < one["kept"] < 0.05
        assert one["rounded"] > 0
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| sizes unet | " in table
