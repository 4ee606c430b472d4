"""Simulated links are as slow as they are told to be; what pays on them is arithmetic that is checked by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.bench import links, simulated_link
from tandemrt.bench.break_even import Painter, Places, painter_of
from tandemrt.runtime import Handover
from tandemrt.runtime.errors import BenchmarkError

REPORT = Path(__file__).resolve().parents[2] / "docs" / "report" / "hybrid" / "report.json"


def test_a_link_is_no_faster_than_its_line(tmp_path: Path) -> None:
    (tmp_path / "a message").write_bytes(bytes(50_000))
    try:
        link = links.link_figures(20, 8, [tmp_path / "a message"], 2)
    except BenchmarkError as error:
        pytest.skip(str(error))
    assert (link["mbit_per_s"], link["round_trip_ms"]) == (20, 8)
    taken, line_ms = link["taken"]["a message"], 50_000 * 8 / 20e3
    assert {part["count"] for part in taken.values()} == {2}
    assert taken["connect_ms"]["minimum"] >= 8
    assert taken["kept_ms"]["minimum"] >= 8 + line_ms
    # Besides the handshake, the first packets are few until they are acknowledged.
    assert taken["fresh_ms"]["minimum"] >= 8 + 8 + line_ms


def test_where_no_link_can_be_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "refused.py").write_text("import sys; sys.exit('no link can be simulated here: not permitted')")
    monkeypatch.setattr(simulated_link, "__file__", str(tmp_path / "refused.py"))
    with pytest.raises(BenchmarkError, match=r"links: no link can be simulated here: not permitted\. It takes Linux"):
        links.link_figures(5, 10, [], 1)


def test_what_is_sent() -> None:
    sent = links.messages()
    values = 4 * 64 * 64
    for name, tensor in (("latent float32", 4 * values), ("latent float16", 2 * values),
                         ("state 2M float32", 8 * values), ("state 2M float16", 4 * values)):  # fmt: skip
        assert tensor < len(sent[name]) < tensor + 600
        assert Handover.from_bytes(sent[name]).step == links.LARGE
    assert sent["picture PNG"].startswith(b"\x89PNG")
    assert sent["picture JPEG"].startswith(b"\xff\xd8")


def test_pictures_have_the_frequencies_of_photographs() -> None:
    light = np.asarray(links.picture_like_a_photograph(256)).astype(float).mean(axis=-1)
    power = np.abs(np.fft.fft2(light)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    edges = np.geomspace(1 / 64, 1 / 4, 9)
    rings = [power[(frequency >= low) & (frequency < high)].mean() for low, high in pairwise(edges)]
    slope = np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(rings), 1)[0]
    assert slope == pytest.approx(-2.4, abs=0.2)


DEVICE = Painter(text_ms=10, large_ms=100, small_ms=40, decode_ms=50)


@pytest.mark.parametrize(
    ("latent_ms", "picture_ms", "server", "least"),
    [
        # A step there saves 90 ms of the large denoiser's here, 30 ms of the small one's; the text there takes 1 ms.
        (100, 0, 10, {"same_plan": 2, "small_alone": 4, "whole_picture": None}),
        (100, 1000, 10, {"same_plan": 2, "small_alone": 4, "whole_picture": 1}),
        # All there takes 106 ms and the download, handed over after all ten steps 261.
        (100, 150, 10, {"same_plan": 2, "small_alone": 4, "whole_picture": None}),
        (100, 156, 10, {"same_plan": 2, "small_alone": 4, "whole_picture": 10}),
        (2000, 0, 10, {"same_plan": None, "small_alone": None, "whole_picture": None}),
        # A server that is no faster helps nobody but who wants all of it there.
        (1, 1, 1, {"same_plan": None, "small_alone": None, "whole_picture": 1}),
    ],
)  # fmt: skip
def test_from_how_many_steps_it_pays(latent_ms: float, picture_ms: float, server: float, least: Any) -> None:
    places = Places(DEVICE, DEVICE.times_faster(server), 10, latent_ms, picture_ms)
    assert places.least() == least


def test_the_times_of_a_plan() -> None:
    places = Places(DEVICE, DEVICE.times_faster(10), 10, 100, 150)
    assert places.handed_over(4) == pytest.approx(1 + 40 + 100 + 10 + 240 + 50)
    assert places.on_device(4) == pytest.approx(10 + 400 + 240 + 50)
    assert places.on_server == pytest.approx(1 + 100 + 5 + 150)
    assert places.server_share(4) == pytest.approx(41 / 106)


def test_what_steps_take_is_read_from_a_report() -> None:
    report = json.loads(REPORT.read_text("utf-8"))
    device, of = painter_of(report)
    assert of == "hybrid-sd: a benchmark, tandemrt openvino:cpu:bf16, unet and unet_small"
    parts = {row["name"]: row["figures"]["ms"]["samples"] for row in report["sections"][1]["rows"]}
    # Of 4 and 6 steps.
    assert device.large_ms == np.median(parts["tandemrt openvino:cpu:bf16: unet"]) / 4
    assert device.small_ms == np.median(parts["tandemrt openvino:cpu:bf16: unet_small"]) / 6


@pytest.mark.parametrize("name", ["sdxs", "vae"])
def test_other_reports_are_refused(name: str) -> None:
    report = json.loads((REPORT.parents[1] / name / "report.json").read_text("utf-8"))
    with pytest.raises(BenchmarkError, match="not of a plan of two denoisers"):
        painter_of(report)


def test_figures_of_every_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(mbit: float, round_trip_ms: float, files: list[Path], rounds: int) -> dict[str, Any]:
        spread = {"median": 100.0, "p10": 90.0, "p90": 110.0, "count": rounds}
        each = {file.name: {"fresh_ms": spread, "kept_ms": spread} for file in files if file.stat().st_size}
        return {"mbit_per_s": mbit, "round_trip_ms": round_trip_ms, "taken": each}

    monkeypatch.setattr(links, "link_figures", taken)
    out = tmp_path / "links.json"
    links.main(["--report", str(REPORT), "--json", str(out), "--mbit", "5", "50", "--round-trip-ms", "10"])
    facts = json.loads(out.read_text())
    assert [(link["mbit_per_s"], link["round_trip_ms"]) for link in facts["links"]] == [(5, 10), (50, 10)]
    assert list(facts["links"][0]["taken"]) == list(links.messages())
    assert [len(link["break_even"]) for link in facts["links"]] == [len(links.DEVICES)] * 2
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| 5 Mbit/s, 10 ms | 100 (90–110) |" in table
    device = facts["device"]
    told = f"| 50 Mbit/s, 10 ms; {device['large_ms']:.0f}, {device['small_ms']:.0f} | from 1 | from 1 | never |"
    assert told in table
