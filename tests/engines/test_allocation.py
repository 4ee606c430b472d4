"""Step engines allocate no arrays in rows after the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.runtime import Pipeline

from ..runtime.test_allocation import OBJECTS_BYTES, ROWS, SIZE, TARGETS, peaks_bytes, streamed
from .test_sampling import build


@pytest.mark.parametrize("target", TARGETS)
def test_rows_after_the_first_allocate_nothing(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path))
    build(tiny_path, tmp_path, "unet", target=target, profiles=(f"{SIZE}:guided",))
    with Pipeline.open(tiny_path, target, threads=1) as pipe:
        stream = streamed(pipe)
        peaks = peaks_bytes(stream)
        assert stream.result().timings.step_engines
    assert len(peaks) == ROWS - 1
    assert max(peaks) < OBJECTS_BYTES
