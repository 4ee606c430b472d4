"""What contenders computed in, as reports tell it."""

from __future__ import annotations

import msgspec
import pytest

from tandemrt.bench.reports.markdown import markdown
from tandemrt.bench.reports.precision import precisions_of, with_precisions
from tandemrt.bench.reports.schema import Report, Row, Section

from .sample import OURS, PEER, report, section

HALF = f"{OURS}:bf16"


def ran(words: dict[str, str], request: str = "a preset of old") -> Report:
    """Our contender in bf16, another in what its graphs are in, and a peer; with what they told."""
    measured = section((1.0, 1.0, 1.0), (4.0, 4.4, 3.6))
    ours, peer, _ = measured.rows
    rows = (msgspec.structs.replace(ours, name=HALF), msgspec.structs.replace(peer, name=OURS), peer)
    rows = (*rows[:2], msgspec.structs.replace(peer, figures={"total": peer.figures["total"]}))
    told = Section(
        key="contenders",
        title="What ran",
        columns=(),
        rows=tuple(
            Row(name=name, words={"precision": words[name]} if name in words else {}) for name in (HALF, OURS, PEER)
        ),
    )
    sections = (msgspec.structs.replace(measured, baseline=HALF, rows=rows), told)
    return msgspec.structs.replace(report(), sections=sections, request={"of": request})


@pytest.mark.parametrize(
    ("words", "request_", "found"),
    [
        ({PEER: "float32"}, "bundle", {HALF: "bf16", PEER: "fp32"}),
        ({PEER: "bfloat16"}, "preset sd15 full fp16", {HALF: "bf16", OURS: "fp16", PEER: "bf16"}),
        ({PEER: "the graphs'"}, "preset sd15 full fp32", {HALF: "bf16", OURS: "fp32", PEER: "fp32"}),
        ({OURS: "fp32, int8", PEER: "float32, convolutions in TF32"}, "bundle", {
            HALF: "bf16", OURS: "fp32, int8", PEER: "fp32, convolutions in TF32"}),
    ],
)  # fmt: skip
def test_a_precision_is_what_was_told_or_what_the_target_and_the_graphs_say(
    words: dict[str, str], request_: str, found: dict[str, str]
) -> None:
    assert precisions_of(ran(words, request_)) == found


def test_a_peer_is_compared_with_tandemrt_in_the_same_precision() -> None:
    """In fp32 the peer is as fast as ours, and takes four times as long as ours in bf16."""
    text = markdown(ran({PEER: "float32"}, "preset sd15 full fp32"))
    assert "|  | computes in | s, p50 | s, p90 | s, p99 | times ours | times TandemRT in the same precision |" in text
    assert f"| {HALF} | bf16 | 1.00 | 1.00 | 1.00 | 1.00 (1.00–1.00) |  |" in text
    assert f"| {PEER} | fp32 | 4.00 | 4.32 | 4.39 | 4.00 (3.60–4.40) | 1.00 (1.00–1.00) |" in text


def test_what_nobody_told_has_no_column() -> None:
    assert with_precisions(report()) == report()
    assert "in the same precision" not in markdown(ran({PEER: "float16"}, "preset sd15 full fp32"))
