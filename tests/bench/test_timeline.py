"""The picture of a timeline: bars where and as long as the trace says, each under the one that it is part of."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tandemrt.bench.timeline import bars, drawn, main
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.trace import Trace, span

SVG = "{http://www.w3.org/2000/svg}"


def test_bars_lie_in_one_another_and_side_by_side(tmp_path: Path) -> None:
    trace = Trace()
    with trace.recording():
        for row in (0, 1):
            with span("row", row):
                with span("model", "unet <both>"):
                    sum(range(50_000))
                with span("update", row):
                    sum(range(5_000))
    trace.write(tmp_path / "trace.json")
    ((_, lane),) = bars(trace.facts())
    assert [(bar.name, bar.depth) for bar in lane] == [
        ("row 0", 0), ("model unet <both>", 1), ("update 0", 1), ("row 1", 0), ("model unet <both>", 1), ("update 1", 1)
    ]  # fmt: skip
    main([str(tmp_path / "trace.json"), "--svg", str(tmp_path / "trace.svg")])
    picture = (tmp_path / "trace.svg").read_text("utf-8")
    assert picture == drawn(trace.facts())
    boxes = [box for box in ElementTree.fromstring(picture).iter(f"{SVG}rect") if len(box)]
    assert [(box[0].text or "").partition(":")[0] for box in boxes] == [bar.name for bar in lane]
    lefts = [float(box.get("x", "nan")) for box in boxes]
    assert lefts == sorted(lefts)
    rights = [left + float(box.get("width", "nan")) for left, box in zip(lefts, boxes, strict=True)]
    assert rights[1] <= lefts[2] + 0.2
    assert rights[0] <= lefts[3] + 0.2
    assert max(rights) <= 1200


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"traceEvents": []}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ArgumentError, match="no timeline"):
        main([str(tmp_path / "trace.json"), "--svg", str(tmp_path / "trace.svg")])
    assert not (tmp_path / "trace.svg").exists()
