"""What a hand-over costs: the same bits from both sides, and figures of every part."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.bench import handoff
from tandemrt.bench.handoff_half import latent_psnr_db
from tandemrt.bench.handoff_parts import PARTS, Exchange, server_times
from tandemrt.bench.servers import served
from tandemrt.runtime import Cloud, Handover
from tandemrt.runtime.errors import ArgumentError, BenchmarkError, CloudError

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_both_hand_overs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    small = ["--size", "64", "--threads", "1", "--repeats", "3", "--warm-up", "1", "--pictures", "2"]
    handoff.main([str(tmp_path / "bundle"), "--json", str(out), *small])
    facts = json.loads(out.read_text())
    first, further = facts["cases"]
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
    assert first["goal_met"] is further["goal_met"] is None
    half = facts["half"]
    assert half["steps"] == [["unet", 10], ["unet_small", 15]]
    # 11 bits of what was handed over, which is rounded once; what follows may do more with it, or less.
    assert 70 < half["psnr_db"]["state"]["minimum"] < 110
    for name in ("latents", "pictures"):
        assert half["psnr_db"][name]["count"] == 2
        assert 30 < half["psnr_db"][name]["minimum"] < 200
    saved = half["received_bytes"]["float32"] - half["received_bytes"]["float16"]
    assert abs(saved - 2 * tensor / 2) < 16  # with an earlier prediction; headers are of other words
    assert "2 pictures of unet 10, unet_small 15 steps, handed over after 10:" in table
    assert "bundle's unet_small on onnxruntime:cpu, 1 threads in each process, 3 rounds in turns;" in table


def test_an_exchange_is_what_a_cloud_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def exchanged(_: Cloud, method: str, path: str, body: bytes, *more: Any) -> bytes:
        sent.append(body)
        raise CloudError("there", "refused", "did not help")

    monkeypatch.setattr(Cloud, "_exchanged", exchanged)
    asked = {"prompt": "red", "steps": [["unet", 2]], "seed": 7, "until": 2, "start_step": 1}
    exchange = Exchange(asked, {"state": np.ones((1, 1, 4, 8, 8), np.float32)}, "ab" * 32)
    with pytest.raises(CloudError):
        Cloud("http://127.0.0.1:9").run(asked, exchange.tensors, exchange.plan)
    assert sent == [exchange.message]


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


def test_whether_the_goal_is_met_is_told() -> None:
    cases = [
        {"case": case, "cost_ms": {"median": cost}, "goal_met": met}
        for case, cost, met in (("the first step", 2.714, True), ("a further step", 3.0, False), ("another", 1.0, None))
    ]
    assert handoff.goal_line(cases) == (
        "The goal, a cost below 3 ms at the median, for a latent of 1x4x64x64: met by the first step (2.71), missed by "
        "a further step (3.00), not set for another (1.00).\n"
    )


@pytest.mark.parametrize(("side", "there_s", "met"), [(64, 0.0, True), (64, 0.02, False), (32, 0.0, None)])
def test_the_goal_is_set_for_one_latent(
    side: int, there_s: float, met: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handover = Handover(np.zeros((1, 1, 4, side, side), np.float32), 2, "", "", 0)

    class Sides:
        pipe = None

        @staticmethod
        def here(*_: Any) -> Handover:
            return handover

        @staticmethod
        def there(*_: Any) -> Handover:
            time.sleep(there_s)
            return handover

        @staticmethod
        def exchange(*_: Any) -> None:
            return None

    monkeypatch.setattr(handoff, "exchanged", lambda *_: ({"beyond": 1.0}, {}))
    monkeypatch.setattr(handoff, "own_parts", lambda *_: {})
    figures = handoff.case_figures(Sides(), handoff.CASES[0], 5, 0, 9)  # type: ignore[arg-type]
    assert figures["goal_met"] is met


def test_latents_peak_is_their_range() -> None:
    reference = np.array([-4.0, 4.0], np.float32)
    assert latent_psnr_db(reference + np.float32(0.08), reference) == pytest.approx(40, abs=1e-3)
    assert latent_psnr_db(reference, reference) == 200


def test_no_pictures_are_no_figures(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--pictures: not usable, got 0"):
        handoff.main([str(tmp_path), "--json", str(tmp_path / "figures.json"), "--pictures", "0"])


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
