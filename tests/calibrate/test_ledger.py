"""A ledger: what was put is there again, a torn line is not, and another measurement's is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.calibrate.ledger import Ledger
from tandemrt.runtime.errors import ArgumentError

GROUND = {"bundle": "a" * 64, "seed": 0, "pair": (1, 2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Ledger(tmp_path / "out" / "some.jsonl", GROUND) as ledger:
        ledger.put("first", {"value": 1})
        ledger.put("second", [1.5, None])
    return tmp_path / "out" / "some.jsonl"


def test_it_goes_on(path: Path) -> None:
    with Ledger(path, GROUND) as ledger:
        assert len(ledger) == 2
        assert ledger.get("first") == {"value": 1}
        assert ledger.get("third") is None
        ledger.put("third", 3)
    with Ledger(path, GROUND) as ledger:
        assert ledger.get("third") == 3


def test_what_was_being_written_when_it_was_killed_is_written_again(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b'{"third": ')
    with Ledger(path, GROUND) as ledger:
        assert len(ledger) == 2
        ledger.put("third", 3)
    with Ledger(path, GROUND) as ledger:
        assert [ledger.get(key) for key in ("second", "third")] == [[1.5, None], 3]


def test_another_measurement_is_refused_and_discarded_on_purpose(path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"another measurement: seed is 0 there, 1 here\. Give.*--discard"):
        Ledger(path, {**GROUND, "seed": 1}).__enter__()
    with Ledger(path, {**GROUND, "seed": 1}, discard=True) as ledger:
        assert len(ledger) == 0
    with Ledger(path, {**GROUND, "seed": 1}) as ledger:
        assert len(ledger) == 0


@pytest.mark.parametrize("content", [b"\x00\xff\n", b"[1]\n", b"{'a': 1}\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.jsonl").write_bytes(content)
    with pytest.raises(ArgumentError, match="not what a measurement left"):
        Ledger(tmp_path / "some.jsonl", GROUND).__enter__()
    assert (tmp_path / "some.jsonl").read_bytes() == content
