"""How what an export takes is told apart by component; the exports themselves are run by hand."""

from __future__ import annotations

import mmap
import sys
import time

import pytest

from tandemrt.bench.export_memory import Meter, markdown

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read and reset through /proc")


def test_seconds_and_peaks_go_to_the_component_that_was_announced() -> None:
    meter = Meter()
    meter("unet: load", 0, 7)
    meter("unet: export", 1, 7)
    # Mapped, since a heap may hand out pages that it still holds.
    with mmap.mmap(-1, 256 << 20) as ballast:
        for page in range(0, len(ballast), mmap.PAGESIZE):
            ballast[page] = 1
    meter("vae_decoder: load", 3, 7)
    meter("vae_decoder: export", 4, 7)
    meter("vae_decoder: verify", 5, 7)
    time.sleep(0.2)
    meter("bundle: publish", 6, 7)
    assert meter.rows.keys() == {"unet", "vae_decoder"}
    assert meter.rows["unet"]["peak_gib"] - meter.rows["vae_decoder"]["peak_gib"] == pytest.approx(0.25, abs=0.1)
    assert meter.rows["unet"]["verify_s"] == 0 < meter.rows["unet"]["export_s"]
    assert meter.rows["vae_decoder"]["verify_s"] >= 0.2


def test_every_component_has_a_line() -> None:
    row = {
        "component": "unet",
        "parameters": 859_520_964,
        "export_s": 48.6,
        "verify_s": 28.1,
        "peak_gib": 3.46,
        "parity": 1.7e-3,
    }
    facts = {
        "machine": {
            "processor": "P", "cores": 2, "memory_gib": 8, "nvidia_devices": [], "system": "Linux", "python": "3.11",
            "versions": {}, "load_average": 0.1,
        },
        "exports": [{"preset": "sd15", "dtype": "fp16", "rows": [row | {"islands": 145}]}],
    }  # fmt: skip
    assert "| sd15 unet | fp16 | 859.5 | 49 | 28 | 3.5 | 1.7e-03 | 145 |" in markdown(facts)
