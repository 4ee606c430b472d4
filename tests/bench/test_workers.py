"""The bench of two workers runs on any bundle, all its ways predict the same, and its table says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandemrt.bench import workers
from tandemrt.bench.worker_ways import BATCHED, WAYS, Case, cpu_blocks, save_mapped

from ..runtime.tiny_bundle import write_tiny_bundle


def test_figures_of_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An interpreter for each takes its time; one is started below.
    monkeypatch.setattr(workers, "_apart", lambda work, *arguments: work(*arguments))
    write_tiny_bundle(tmp_path / "bundle")
    out = tmp_path / "figures.json"
    small = ["--size", "64", "--threads", "4", "--repeats", "2", "--warm-up", "1"]
    workers.main([str(tmp_path / "bundle"), "--json", str(out), *small])
    figures = json.loads(out.read_text())["figures"]
    assert [(one["backend"], one["way"]) for one in figures] == [
        (backend, way) for backend in WAYS for way in WAYS[backend]
    ]
    for one in figures:
        assert one["relative_rms"] < 1e-5
        assert one["ratio"]["count"] == 2
        assert 0 < one["least_ratio"] < float("inf")
    assert {one["relative_rms"] for one in figures if one["way"] == BATCHED} == {0}
    table = capsys.readouterr().out
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert "| bundle unet, onnxruntime: two, weights mapped, pinned |" in table
    assert "4 threads in all, 2 rounds, latents bundle 8x8;" in table


def test_memory_is_measured_in_an_interpreter_of_its_own() -> None:
    assert workers._apart(workers._pss_mib) > 1


def test_weights_are_mapped_from_a_file_beside_the_graph(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    case = Case(tmp_path / "bundle" / "unet" / "model.onnx", tmp_path / "model.onnx", 8)
    for _ in range(2):
        save_mapped(case)
    assert (tmp_path / "model.onnx_data").stat().st_size > 1024


def test_workers_have_cpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, blocks in (({0}, ([0], [0])), ({1, 3}, ([1], [3])), ({0, 1, 2, 5}, ([0, 1], [2, 5]))):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cpus=cpus: cpus)
        assert cpu_blocks() == blocks
