"""What the processors do besides what is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandemrt.bench.other_work import Look, busy_s, other_cores, own_s


def test_busy_seconds_are_of_processors_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    lines = ("cpu 9 9 9 9 9 9 9 9 9 9", "cpu0 1 2 4 800 1600 8 16 32 64 128", "cpu1 100 0 0 0 0 0 0 0 0 0")
    stat.write_text("\n".join(lines), "ascii")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy_s(stat) == pytest.approx((1 + 2 + 4 + 8 + 16 + 32) / ticks)
    assert busy_s(tmp_path / "none") is None
    stat.write_text("cpu7 1 2 3\n", "ascii")
    assert busy_s(stat) is None


def test_own_seconds_are_of_children_too() -> None:
    before = own_s()
    busy = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-S", "-c", busy], check=True)
    assert own_s() - before >= 0.19


def test_what_others_had_is_what_was_not_our_own() -> None:
    assert other_cores(Look(0.0, 100.0, 10.0), Look(8.0, 116.0, 14.0)) == 1.5
    assert other_cores(Look(0.0, 100.0, 10.0), Look(8.0, 103.0, 14.0)) == 0.0
    assert other_cores(Look(0.0, None, 10.0), Look(8.0, 116.0, 14.0)) is None
