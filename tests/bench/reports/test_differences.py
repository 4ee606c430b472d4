"""What differs between two reports besides figures."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tandemrt.bench.reports.differences import apart, machine_changes, ran_changes, unmatched
from tandemrt.bench.reports.schema import Report, Row, Section, write_report_json
from tandemrt.runtime.cli import main

from .sample import OURS, PEER, report, section

EVEN = (1.0, 1.01, 0.99, 1.0)


def test_what_only_one_has_measured_is_told() -> None:
    failed = section(EVEN, EVEN)
    rows = (failed.rows[0], Row(name=PEER, failed="its process was ended"), Row(name="optimum", failed="another why"))
    before, after = report(), msgspec.structs.replace(report(), sections=(msgspec.structs.replace(failed, rows=rows),))
    assert list(unmatched(before, after)) == [f"Whole pictures, {PEER}: measured → not measured, its process was ended"]
    assert list(unmatched(after, before)) == [f"Whole pictures, {PEER}: not measured, its process was ended → measured"]
    less = msgspec.structs.replace(report(), sections=())
    assert list(unmatched(before, less)) == [f"Whole pictures, {OURS}, {PEER}: measured → not there"]
    assert list(unmatched(before, before)) == []


def test_another_machine_is_told() -> None:
    other = report()
    machine = msgspec.structs.replace(other.machine, cores=4, versions={"tandemrt": "0.2.0"})
    lines = list(machine_changes(report(), msgspec.structs.replace(other, machine=machine)))
    assert lines == ["cores: 2 → 4", "tandemrt: 0.1.0 → 0.2.0"]


def with_ran(**words: str) -> Report:
    """A report whose peer told these words of itself, and ours the machine's version."""
    told = {"runs": "Python 3.11.7, tandemrt 0.1.0", "threads": "2"}
    rows = (Row(name=OURS, words=told), Row(name=PEER, words={**told, **words}))
    ran = Section(key="contenders", title="What ran", columns=(), rows=rows)
    return msgspec.structs.replace(report(), sections=(section(EVEN, EVEN), ran))


def test_what_a_contender_ran_otherwise_with_is_told() -> None:
    before = with_ran(runs="Python 3.11.7, torch 2.13.0, onnxruntime 1.30.0", precision="float32")
    after = with_ran(runs="Python 3.11.7, onnxruntime 1.31.1", precision="bfloat16", otherwise="DDIM in place of Euler")
    assert list(ran_changes(before, after)) == [
        f"{PEER}: torch: 2.13.0 → none",
        f"{PEER}: onnxruntime: 1.30.0 → 1.31.1",
        f"{PEER}: computes in: fp32 → bf16",
        f"{PEER}: otherwise than asked: nothing → DDIM in place of Euler",
    ]
    assert list(ran_changes(before, before)) == []
    machine = msgspec.structs.replace(before.machine, versions={"tandemrt": "0.2.0"})
    newer = msgspec.json.decode(msgspec.json.encode(before).replace(b"tandemrt 0.1.0", b"tandemrt 0.2.0"), type=Report)
    assert list(ran_changes(before, msgspec.structs.replace(newer, machine=machine))) == []


@pytest.mark.parametrize("name", ["steps", "size", "guidance scale"])
def test_another_request_is_another_thing(name: str) -> None:
    one, other = (msgspec.structs.replace(report(), request={name: value}) for value in ("1", "2"))
    assert apart(one, other) == (f"{name}: 1 → 2",)
    assert apart(one, one) == ()


@pytest.mark.parametrize(("file_mb", "same"), [({"unet": 1.02}, True), ({"unet": 1.2}, False), ({"dit": 1.0}, False)])
def test_a_bundle_of_other_models_is_another_thing(file_mb: dict[str, float], same: bool) -> None:
    other = msgspec.structs.replace(report().subjects[0], name="b", digest="cd" * 32, file_mb=file_mb)
    told = apart(report(), msgspec.structs.replace(report(), subjects=(other,)))
    assert told == (() if same else ("bundle: bundle → b, of other models",))


def test_different_things_are_neither_better_nor_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = report((2.0, 2.02, 1.98, 2.0))
    for name, request in (("a", report().request), ("b", {"steps": "50"})):
        write_report_json(
            tmp_path / name, msgspec.structs.replace(slower if name == "b" else report(), request=request)
        )
    assert main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("They measured different things (steps: 10,15 → 50): no figure is better or worse")
    lines = told.splitlines()[1:]
    assert any(line.startswith("more ") for line in lines) and any(line.startswith("less ") for line in lines)
    assert not any(line.startswith(("better", "worse")) for line in lines) and "differ beyond noise" in told


def test_a_figure_without_samples_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    write_report_json(path, report())
    facts = json.loads(path.read_bytes())
    facts["sections"][0]["rows"][0]["figures"]["total"]["samples"] = []
    path.write_text(json.dumps(facts), encoding="utf-8")
    assert main(["bench", "compare", str(path), str(path)]) == 1
    assert "report.json: is no report (" in capsys.readouterr().err
