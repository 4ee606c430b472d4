"""What a hand-over costs: the same bits from both sides, and figures of every part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.bench import handoff
from tandemrt.bench.handoff_parts import PARTS, server_times
from tandemrt.bench.servers import served
from tandemrt.runtime import Handover
from tandemrt.runtime.errors import BenchmarkError

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_both_hand_overs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    small = ["--size", "64", "--threads", "1", "--repeats", "3", "--warm-up", "1"]
    handoff.main([str(tmp_path / "bundle"), "--json", str(out), *small])
    first, further = json.loads(out.read_text())["cases"]
    # (1+H, B, C, h, w) float32, once there and once back where steps go on from a state.
    tensor = 4 * 4 * 8 * 8
    assert first["state"] == further["state"] == [1, 1, 4, 8, 8]
    assert further["sent_bytes"] - first["sent_bytes"] > tensor
    assert tensor < first["received_bytes"] < tensor + 1000
    for case in (first, further):
        assert PARTS.keys() | {"server: total"} <= case["parts_ms"].keys()
        assert {spread["count"] for spread in case["parts_ms"].values()} == {3}
        assert case["cost_ms"]["count"] == case["cost_by_server_ms"]["count"] == 3
        assert case["cost_by_server_ms"]["minimum"] > 0
        seen, parts = case["parts_ms"], ("connect", "wait", "read")
        assert sum(seen[part]["maximum"] for part in parts) >= seen["server: total"]["minimum"]
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| a further step, state 1x1x4x8x8 |" in table
    assert "bundle's unet_small on onnxruntime:cpu, 1 threads in each process, 3 rounds in turns;" in table


def test_another_state_is_no_figure() -> None:
    class Sides:
        @staticmethod
        def here(*_: Any) -> Handover:
            return Handover(np.zeros((1, 1, 4, 8, 8), np.float32), 2, "", "", 0)

        @staticmethod
        def there(*_: Any) -> Handover:
            return Handover(np.full((1, 1, 4, 8, 8), 1e-7, np.float32), 2, "", "", 0)

    with pytest.raises(BenchmarkError, match="the server's state is another one"):
        handoff.case_figures(Sides(), handoff.CASES[0], 1, 0, 9)  # type: ignore[arg-type]


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchmarkError, match=r"ended with status 1\. .*no-bundle"),
        served(tmp_path / "no-bundle", "auto", None),
    ):
        pass


def test_a_servers_times() -> None:
    told = "text;dur=0.5, queue;desc=waited;dur=1, denoise;dur=12.25, total;dur=13;desc=all"
    assert server_times(told) == {"text": 0.5, "queue": 1, "denoise": 12.25, "total": 13}
    assert server_times("") == {}
