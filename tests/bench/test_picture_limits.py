"""What parts of a picture take at least, and how that is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandemrt.bench import picture_limits
from tandemrt.bench.contenders import Answer
from tandemrt.bench.entrants import Work
from tandemrt.bench.part_sections import parts_section, peaks_section
from tandemrt.bench.picture_limits import Least, PictureLimits, limits_by_target, rates_by_target
from tandemrt.bench.rates import Options, Rates
from tandemrt.bench.room import Weights
from tandemrt.bench.rounds import Taken
from tandemrt.bench.sections import pictures_section

OURS, PEER = "tandemrt openvino:cpu:bf16", "diffusers"
LIMITS = PictureLimits(
    measured=(Rates({"fp32": 1e9, "bf16": 3e9}, 1e10), Rates({"fp32": 0.95e9, "bf16": 4e9}, 0.98e10)),
    text=Least(1e9, 0.25),
    decode=Least(4e9, 1.0),
    rows={"unet": (Least(1e9, 0.25), Least(2e9, 0.5))},
)
ROUND = {
    "total_s": 10.0,
    "text_s": 1.0,
    "decode_s": 4.0,
    "unet_s": 5.0,
    "host_s": 0.1,
    "unet_rows": 5.0,
    "unet_guided": 3.0,
    "peak_mib": 1.0,
}


def taken(figures: dict[str, float]) -> Taken:
    """Two rounds that told these figures."""
    return Taken(rounds=[Answer(figures, {})] * 2)


def test_parts_take_what_their_calls_do() -> None:
    parts = LIMITS.parts(ROUND, 2)
    assert parts == {"text_s": Least(1e9, 0.25), "decode_s": Least(8e9, 2.0), "unet_s": Least(8e9, 2.0)}
    assert LIMITS.flops(ROUND, 2) == 17e9


def test_parts_are_told_beside_their_limit() -> None:
    both = {OURS: taken(ROUND), PEER: taken({"total_s": 20.0, "unet_s": 9.0, "peak_mib": 1.0})}
    section = parts_section(both, {OURS: LIMITS}, 2)
    assert [column.title for column in section.columns] == ["ms a call", "share of the call", "of the limit"]
    rows = {row.name: row.figures for row in section.rows}
    assert rows[f"{OURS}: decoder"]["limit"].samples == (0.5, 0.5)
    assert rows[f"{OURS}: unet"]["gflops"].samples == pytest.approx((1.6, 1.6))
    assert "limit" not in rows[f"{OURS}: the loop itself"] and "limit" not in rows[f"{PEER}: unet"]
    assert [column.of for column in parts_section(both, {}, 2).columns] == ["ms", "share"]


def test_pictures_are_told_beside_products_in_fp32() -> None:
    both = {OURS: taken(ROUND), PEER: taken({"total_s": 20.0, "peak_mib": 1.0}), "optimum": Taken(failed="no")}
    section = pictures_section(both, 2, {OURS: LIMITS})
    ours, peer, failed = (row.figures for row in section.rows)
    assert ours["limit"].samples == pytest.approx((1.7, 1.7))
    assert peer["gflops"].samples == pytest.approx((0.85, 0.85))
    assert failed == {}
    assert "limit" not in {column.of for column in pictures_section(both, 2, {}).columns}


def test_why_there_is_no_limit_is_told(tmp_path: Path) -> None:
    work = Work(
        bundle=tmp_path,
        checkpoint=None,
        added={},
        prompt="",
        arguments={},
        steps=(("unet", 1),),
        guidance_scale=1.0,
        height=64,
        width=64,
        decoder=None,
        threads=1,
        device="cpu",
        cache=tmp_path,
        weights=Weights(),
    )
    targets, options = ("tensorrt-rtx:sm89", "onnxruntime:cpu"), Options(64, 4096, 1, 0, 1)
    rates, untold = rates_by_target(work, targets, options, lambda *_: None)
    assert rates == {}
    assert untold[0] == "The limit is not told on tensorrt-rtx:sm89: tensorrt-rtx runs no graphs, as the products are."
    assert untold[1].startswith("The limit is not told on onnxruntime:cpu: ") and "tandem.json" in untold[1]


def test_peaks_are_told_by_precision() -> None:
    rows = peaks_section({OURS: LIMITS}).rows
    assert [row.words["measured"] for row in rows] == ["1.00, 0.950", "3.00, 4.00", "10.0, 9.80"]
    assert {row.name: figure.median for row in rows for figure in row.figures.values()} == {
        f"{OURS}: products, fp32": 1.0,
        f"{OURS}: products, bf16": 4.0,
        f"{OURS}: copies": 10.0,
    }


def test_what_was_not_steady_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an own process's answer: products in bf16 that were a third more after the rounds."""
    monkeypatch.setattr(picture_limits, "in_fresh_process", lambda *_: LIMITS)
    work: Any = None
    before = {"openvino:cpu:bf16": LIMITS.measured[0]}
    limits, told = limits_by_target(work, before, Options(64, 4096, 1, 0, 1), lambda *_: None, guided=False)
    assert limits == {"openvino:cpu:bf16": LIMITS}
    assert told == (
        "What the machine does at best on openvino:cpu:bf16 was not steady: products, bf16 3 before the rounds, 4 "
        "after (GFLOP/s, GB/s). Shares of the limit are of the better, which may still be less than the machine can "
        "do.",
    )
