"""The timeline of a run: what it names, how its spans nest, and that it agrees with the timings."""

from __future__ import annotations

import contextvars
import errno
import json
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import ExecutionError, Output, Pipeline, trace, traced
from tandemrt.runtime.cli import main
from tandemrt.runtime.trace import Trace

from .test_concurrency import picture

Event = dict[str, Any]
JOB: dict[str, Any] = {
    "prompt": ["red", "blue"],
    "steps": {"unet": 2, "unet_free": 2},
    "image": picture(3),
    "strength": 1.0,
    "control_image": {"canny": picture(1)},
    "control_guidance_end": 0.5,
    "previews": 2,
    "seed": 7,
}


def read(path: Path) -> list[Event]:
    """The spans of a file; what makes it one that Chrome reads is checked."""
    facts = json.loads(path.read_text("utf-8"))
    spans = [event for event in facts["traceEvents"] if event["ph"] == "X"]
    names = {event["tid"]: event["args"]["name"] for event in facts["traceEvents"] if event["ph"] == "M"}
    assert len(spans) + len(names) == len(facts["traceEvents"])
    for span in spans:
        assert set(span) == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
        assert span["ts"] > 0
        assert span["dur"] >= 0
        assert span["name"].startswith(span["cat"])
        assert names[span["tid"]]
    assert spans == sorted(spans, key=lambda span: span["ts"])
    return spans


def within(spans: Sequence[Event]) -> list[str]:
    """The category of what each span lies in; spans of a thread that only overlap are refused."""
    parents, open_spans = [], []
    for span in spans:
        ends = span["ts"] + span["dur"]
        while open_spans and open_spans[-1][1] <= span["ts"]:
            open_spans.pop()
        assert not open_spans or ends <= open_spans[-1][1] + 1e-3  # a rounded microsecond's thousandth
        parents.append(open_spans[-1][0] if open_spans else "")
        open_spans.append((span["cat"], ends))
    return parents


def spent_ms(spans: Sequence[Event], category: str) -> float:
    return sum(span["dur"] for span in spans if span["cat"] == category) / 1e3


def test_a_run_names_all_that_took_time(control_pipe: Pipeline, tmp_path: Path) -> None:
    with traced(tmp_path / "trace.json"):
        output = control_pipe(**JOB)
    spans = read(tmp_path / "trace.json")
    assert Counter(zip((span["name"] for span in spans), within(spans), strict=True)) == {
        ("text", ""): 1,
        ("load text_encoder", "text"): 1,
        ("model text_encoder", "text"): 3,
        ("pictures", ""): 1,
        ("load vae_encoder", "pictures"): 1,
        ("model vae_encoder", "pictures"): 1,
        **{(f"load {name}", ""): 1 for name in ("controlnet_canny", "unet", "unet_free")},
        **{(f"row {row}", ""): 1 for row in range(4)},
        **{(f"bind {name}", ""): 1 for name in ("controlnet_canny", "unet", "unet_free")},
        **{(f"model {name} (both)", "row"): 2 for name in ("controlnet_canny", "unet", "unet_free")},
        **{(f"update {row}", "row"): 1 for row in range(4)},
        **{(f"preview {row}", ""): 1 for row in (1, 3)},
        ("load vae_decoder", "preview"): 1,
        ("model vae_decoder", "preview"): 4,
        ("decode", ""): 1,
        ("model vae_decoder", "decode"): 2,
    }
    require_agreement(spans, output)


@pytest.mark.parametrize(("placement", "lanes"), [("sequential", 1), ("parallel", 2)])
def test_a_bar_names_its_branch(control_bundle: Path, tmp_path: Path, placement: str, lanes: int) -> None:
    with Pipeline.open(control_bundle, threads=2) as pipe, traced(tmp_path / "trace.json"):
        pipe(**{**JOB, "guidance_interval": (0.0, 0.5), "placement": placement})
    calls = [span for span in read(tmp_path / "trace.json") if span["name"].endswith(")")]
    assert Counter(span["name"] for span in calls) == {
        **{f"model {name} ({branch})": 2 for name in ("controlnet_canny", "unet")
           for branch in ("conditional", "unconditional")},
        "model unet_free (conditional)": 2,
    }  # fmt: skip
    assert len({span["tid"] for span in calls}) == lanes


def test_the_workers_of_generations_have_names_of_their_own(control_bundle: Path, tmp_path: Path) -> None:
    with Pipeline.open(control_bundle, threads=2) as pipe, traced(tmp_path / "trace.json") as timeline:
        for _ in range(2):
            pipe("red", num_inference_steps=1, placement="parallel")
    named = [event["args"]["name"] for event in timeline.facts()["traceEvents"] if event["ph"] == "M"]
    workers = [name for name in named if name.startswith("tandemrt-branch")]
    assert len(set(workers)) == len(workers) == 2


def require_agreement(spans: Sequence[Event], output: Output) -> None:
    timings = output.timings
    rows = [span["dur"] / 1e3 for span in spans if span["cat"] == "row"]
    for row, timing in zip(rows, timings.rows, strict=True):
        assert timing.model_ms <= row <= timing.total_ms
    in_rows = [span for span, parent in zip(spans, within(spans), strict=True) if parent == "row"]
    assert 0 < spent_ms(in_rows, "model") <= sum(row.model_ms for row in timings.rows)
    for category, stage in (("text", timings.text_ms), ("pictures", timings.image_ms), ("decode", timings.decode_ms)):
        inner = [span for span, parent in zip(spans, within(spans), strict=True) if parent == category]
        assert 0 < spent_ms(inner, "model") <= spent_ms(spans, category) <= stage
    stages = sum(spent_ms(spans, category) for category in ("text", "pictures", "row", "preview", "decode"))
    assert stages <= timings.total_ms


def test_the_same_picture_with_and_without(control_pipe: Pipeline, tmp_path: Path) -> None:
    with traced(tmp_path / "trace.json") as timeline:
        recorded = control_pipe(**JOB).latents
    events = len(timeline.events)
    np.testing.assert_array_equal(control_pipe(**JOB).latents, recorded)
    assert len(timeline.events) == events


def test_what_failed_is_shown_too(control_pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ExecutionError), traced(tmp_path / "trace.json"):
        control_pipe("red", num_inference_steps=2, latents=np.full((1, 4, 8, 8), 1e38, np.float32))
    assert "row 0" in {span["name"] for span in read(tmp_path / "trace.json")}


def test_threads_record_into_one_file(control_pipe: Pipeline, tmp_path: Path) -> None:
    with traced(tmp_path / "trace.json"):
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(lambda: control_pipe("red", num_inference_steps=2),)
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    spans = read(tmp_path / "trace.json")
    lanes = {span["tid"] for span in spans}
    assert len(lanes) == 3
    for lane in lanes:
        own = [span for span in spans if span["tid"] == lane]
        assert Counter(parent for span, parent in zip(own, within(own), strict=True) if span["cat"] == "row") == {"": 2}


def test_a_trace_is_looked_at_while_further_threads_begin_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "get_native_id", count().__next__)  # each span is another thread's
    timeline, interval = Trace(), sys.getswitchinterval()
    recording = threading.Thread(target=lambda: [timeline.add("row", row, 0.0) for row in range(5_000)])
    sys.setswitchinterval(1e-4)
    try:
        recording.start()
        while recording.is_alive():
            shown = timeline.facts()["traceEvents"]
            assert {event["tid"] for event in shown if event["ph"] == "X"} == {
                event["tid"] for event in shown if event["ph"] == "M"
            }
    finally:
        sys.setswitchinterval(interval)
        recording.join()
    assert len(timeline.facts()["traceEvents"]) == 2 * 5_000


def test_off_there_is_nothing_to_allocate() -> None:
    assert trace.span("row", 1) is trace.span("model", "unet")


def test_a_file_that_cannot_be_written_is_an_error_and_nothing_is_left(control_pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(OSError, match=r"trace\.json"), traced(tmp_path / "trace.json"):
        control_pipe("red", num_inference_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_what_failed_goes_before_a_file_that_cannot_be_written(
    control_pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(ExecutionError, match="step 0"), traced(tmp_path / "trace.json"):
        control_pipe("red", num_inference_steps=2, latents=np.full((1, 4, 8, 8), 1e38, np.float32))

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Trace, "write", refused)
    file = tmp_path / "run.json"
    assert main(["generate", str(tmp_path / "none"), "--prompt", "red", "--trace", str(file)]) != 0
    beside, told = capsys.readouterr().err.splitlines()
    assert f"{file}: cannot be written (no space)" in beside
    assert str(tmp_path / "none") in told


def test_generate_writes_one(control_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("red\nblue\n")
    arguments = ["generate", str(control_bundle), "--prompts-file", str(prompts), "--num-inference-steps", "2"]
    file = tmp_path / "deep" / "trace.json"
    assert main([*arguments, "--output-dir", str(out), "--trace", str(file)]) == 0
    assert Counter(span["name"] for span in read(file))["row 0"] == 2
    assert main([*arguments, "--output-dir", str(out), "--force", "--trace", str(control_bundle / "trace.json")]) == 2
    assert main([*arguments, "--output-dir", str(out), "--force", "--trace", str(out)]) == 2
    assert "inside the bundle" in capsys.readouterr().err
    assert main([*arguments, "--output-dir", str(out), "--force", "--trace", "/proc/trace.json"]) == 1
    assert "Give another --trace." in capsys.readouterr().err
