"""A sweep's file: what was measured is there when it is opened again, whatever happened to the process."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tandemrt.calibrate.sweep_file import Ground, PictureQuality, RowTimes, SweepFile
from tandemrt.runtime.calibrations import RowTime
from tandemrt.runtime.errors import ArgumentError, CalibrationError, TandemError

GROUND = Ground(
    format=1, bundle="0" * 64, facts="1" * 64, target="onnxruntime:cpu", threads=1, machine=("x86",), versions={},
    large="unet", small="unet_small", num_inference_steps=4, scorer=None,
)  # fmt: skip
TIMES = RowTimes(by_kind={"unet": RowTime(median_ms=2.0, least_ms=1.0, most_ms=3.0)})


def picture(seed: int, right: bool | None = None) -> PictureQuality:
    return PictureQuality(plan="unet:4", prompt="red", seed=seed, latent_error=0.1, psnr_db=30.0, ssim=0.9, right=right)


def test_what_was_kept_is_there_again(tmp_path: Path) -> None:
    with SweepFile(tmp_path / "new", GROUND) as kept:
        assert (kept.row_times, kept.pictures) == (None, {})
        kept.keep([TIMES])
        kept.keep([picture(0), picture(1, True)])
    with SweepFile(tmp_path / "new", GROUND) as kept:
        assert kept.row_times == TIMES.by_kind
        assert kept.pictures == {("unet:4", "red", 0): picture(0), ("unet:4", "red", 1): picture(1, True)}


def test_a_line_that_was_cut_is_written_anew(tmp_path: Path) -> None:
    with SweepFile(tmp_path, GROUND) as kept:
        kept.keep([picture(0), picture(1)])
        path = kept.path
    whole = path.read_bytes()
    for cut in (1, 2, 60, 100, 150, 200, 400, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:-cut])
        with SweepFile(tmp_path, GROUND) as kept:
            there = len(kept.pictures)
            assert there == max(whole[:-cut].count(b"\n") - 1, 0)
            kept.keep([picture(index) for index in range(there, 2)])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [({"scorer": "x:y"}, "another scorer"), ({"bundle": "3" * 64, "num_inference_steps": 5}, "another bundle and num")],
)
def test_a_sweep_on_another_ground_is_refused_or_discarded(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    with SweepFile(tmp_path, GROUND) as kept:
        kept.keep([picture(0)])
    other = msgspec.structs.replace(GROUND, **change)
    with pytest.raises(ArgumentError, match=f"holds a sweep of {words}"), SweepFile(tmp_path, other):
        pass
    with SweepFile(tmp_path, GROUND) as kept:
        assert len(kept.pictures) == 1
    with SweepFile(tmp_path, other, discard=True) as kept:
        assert kept.pictures == {}
    with SweepFile(tmp_path, other) as kept:
        assert kept.pictures == {}


@pytest.mark.parametrize("content", [b"prompts\n", b'{"kind": 1}\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_another_file_in_its_place_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match="not a sweep's file"), SweepFile(tmp_path, GROUND):
        pass
    assert (tmp_path / "sweep.jsonl").read_bytes() == content


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        SweepFile(tmp_path, GROUND),
        pytest.raises(CalibrationError, match="another run is writing it"),
        SweepFile(tmp_path, GROUND),
    ):
        pass


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TandemError, match=r"cannot be written .*another --out"), SweepFile(tmp_path / "file", GROUND):
        pass
