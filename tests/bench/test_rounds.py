"""Contenders in turns, each a process of its own."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tandemrt.bench import contenders
from tandemrt.bench.cold_command import in_fresh
from tandemrt.bench.contenders import Contender
from tandemrt.bench.probes import NO_PROBES, PROCESSORS_J, Probes
from tandemrt.bench.rounds import MOST_DB, Entrant, Rounds, Taken, in_rounds, psnr_db
from tandemrt.runtime.errors import BenchmarkError

from .processes import require_ended

# Paints the same grey as its seed is, and does what the job's `ends` says at the seed it says.
SCRIPT = """
import sys
sys.path.insert(0, {peers!r})
import os
import signal
import subprocess
import numpy as np
from wire import Painter, serve

class Grey(Painter):
    def __init__(self, job):
        print("opening, as libraries do")
        self.job = job
        self.prepared_s = job["prepared_s"]
        if job.get("ends") == "opening":
            raise RuntimeError("no such model")

    def paint(self, seed, arguments, clock):
        name = arguments.get("name", self.job["name"])
        with open(self.job["log"], "a") as log:
            log.write(f"{{name}} {{seed}}\\n")
        with clock.part("grey_s"):
            picture = np.full((4, 4, 3), seed / 100 + self.job["offset"], np.float32)
        if self.job.get("ends") == f"nan {{seed}}":
            picture[0, 0, 0] = np.nan
        if self.job.get("ends") == f"raise {{seed}}":
            raise ValueError("no such seed")
        if self.job.get("ends") == f"die {{seed}}":
            print("the library's last words", file=sys.stderr, flush=True)
            os._exit(7)
        if self.job.get("ends") == f"hang {{seed}}":
            subprocess.run(["sleep", "60"])
        if self.job.get("ends") in (f"leave {{seed}}", f"leave {{seed}}, die"):
            with open(self.job["log"], "a") as log:
                log.write(f"{{subprocess.Popen(['sleep', '60']).pid}}\\n")
        if self.job.get("ends") == f"leave {{seed}}, die":
            os._exit(7)
        if self.job.get("ends") == f"let go {{seed}}":
            subprocess.Popen(["sleep", "3"], start_new_session=True)
        if self.job.get("ends") == f"killed {{seed}}":
            os.kill(os.getpid(), signal.SIGKILL)
        return picture

serve(Grey)
"""
Start = Callable[..., Callable[[], Contender]]
Run = Callable[..., dict[str, Taken]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    from tandemrt.bench import peers  # noqa: PLC0415

    script = tmp_path / "grey.py"
    script.write_text(SCRIPT.format(peers=str(Path(peers.__file__).parent)), encoding="utf-8")

    def start(name: str, offset: float = 0.0, ends: str = "", prepared_s: float = 0.0) -> Callable[[], Contender]:
        log = str(tmp_path / "log")
        job = {"name": name, "log": log, "offset": offset, "ends": ends, "prepared_s": prepared_s}
        return partial(Contender, name, sys.executable, str(script), job)

    return start


@pytest.fixture
def rounds(tmp_path: Path) -> Run:
    """Of entrants, with (warm-up, count, first seed), and probes."""
    (tmp_path / "pictures").mkdir()

    def rounds(entrants: dict[str, Entrant], *numbers: int, probes: Probes = NO_PROBES) -> dict[str, Taken]:
        taken = in_rounds(entrants, Rounds(*numbers), tmp_path / "pictures", silent, probes)
        assert not list((tmp_path / "pictures").iterdir())
        return taken

    return rounds


def silent(_message: str, _done: int, _total: int) -> None:
    """Report to nobody."""


def logged(folder: Path) -> list[str]:
    """Who painted which seed, in order."""
    return (folder / "log").read_text(encoding="utf-8").split("\n")[:-1]


def test_every_round_begins_with_the_next_contender(start: Start, rounds: Run, tmp_path: Path) -> None:
    taken = rounds({"a": Entrant(start("a")), "b": Entrant(start("b", 0.1))}, 1, 2, 5)
    assert logged(tmp_path) == ["a 5", "b 5", "b 6", "a 6", "a 7", "b 7"]
    assert [len(one.rounds) for one in taken.values()] == [2, 2]
    assert taken["a"].parts == ("total_s", "grey_s", "peak_mib")
    assert all(0 < part <= total for part, total in zip(*map(taken["a"].samples, ("grey_s", "total_s")), strict=True))
    assert taken["b"].psnr_db == pytest.approx([20.0, 20.0], abs=1e-4)
    assert taken["a"].psnr_db == []
    assert taken["a"].opened is not None and taken["a"].opened.figures["open_s"] > 0
    assert taken["a"].opened.words["runs"] == f"Python {platform.python_version()}"


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ("opening", "RuntimeError: no such model"),
        ("raise 2", "ValueError: no such seed"),
        ("nan 2", "returned NaN or Inf"),
        ("die 2", "ended with exit status 7. the library's last words"),
        ("killed 2", "was killed by the system, most likely because memory ran out"),
    ],
)
def test_one_that_fails_is_told_and_the_others_go_on(ends: str, told: str, start: Start, rounds: Run) -> None:
    taken = rounds({"a": Entrant(start("a")), "b": Entrant(start("b", ends=ends))}, 0, 4, 0)
    assert len(taken["a"].rounds) == 4
    assert (taken["b"].rounds, taken["b"].psnr_db) == ([], [])
    assert told in taken["b"].failed


def test_without_the_first_nothing_goes_on(start: Start, rounds: Run, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="a: ValueError: no such seed"):
        rounds({"a": Entrant(start("a", ends="raise 1")), "b": Entrant(start("b"))}, 0, 4, 0)
    assert logged(tmp_path) == ["a 0", "b 0", "b 1", "a 1"]


def test_all_entrants_of_a_process_that_cannot_be_opened_tell_why(start: Start, rounds: Run) -> None:
    shared = start("b", ends="opening")
    taken = rounds({"a": Entrant(start("a")), "b": Entrant(shared), "c": Entrant(shared)}, 0, 1, 0)
    assert taken["a"].rounds
    assert taken["b"].failed == taken["c"].failed == "RuntimeError: no such model."


def test_fresh_starts_take_turns_too(start: Start, tmp_path: Path) -> None:
    entrants = {"a": Entrant(start("a")), "b": Entrant(start("b", ends="raise 7"))}
    taken = in_fresh(entrants, Rounds(1, 2, 5), silent, NO_PROBES)
    assert logged(tmp_path) == ["a 5", "b 5", "b 6", "a 6", "a 7", "b 7"]
    assert [len(one.rounds) for one in taken.values()] == [2, 0]
    assert "no such seed" in taken["b"].failed
    with pytest.raises(BenchmarkError, match="no such seed"):
        in_fresh(dict(reversed(entrants.items())), Rounds(0, 2, 7), silent, NO_PROBES)
    assert logged(tmp_path)[6:] == ["b 7"]


def test_one_that_takes_too_long_is_given_up_with_what_it_started(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender, began = start("a", ends="hang 2")(), time.monotonic()
    contender.opened()
    monkeypatch.setattr(contenders, "LIMIT_S", 0.2)
    with pytest.raises(BenchmarkError, match=r"a: took longer than 0\.2 s"):
        contender.painted(2, {}, tmp_path / "2.npy")
    contender.close()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("ends", ["leave 2", "leave 2, die"])
def test_what_a_contender_started_ends_with_it(ends: str, start: Start, tmp_path: Path) -> None:
    contender = start("a", ends=ends)()
    contender.opened()
    with pytest.raises(BenchmarkError, match="exit status 7") if ends.endswith("die") else nullcontext():
        contender.painted(2, {}, tmp_path / "2.npy")
    contender.close()
    require_ended(int(logged(tmp_path)[-1]))


def test_one_that_holds_on_to_a_contenders_output_is_not_waited_for(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "_ENDING_S", 0.1)
    contender = start("a", ends="let go 2")()
    contender.opened()
    contender.painted(2, {}, tmp_path / "2.npy")
    began = time.monotonic()
    contender.close()
    assert time.monotonic() - began < 2


def test_half_an_answer_is_none(tmp_path: Path) -> None:
    script = tmp_path / "half.py"
    script.write_text("import sys; sys.stdin.readline(); print('{', end=''); sys.exit('no more')", encoding="utf-8")
    contender = Contender("a", sys.executable, str(script), {})
    with pytest.raises(BenchmarkError, match=r"a: ended with exit status 1\. no more"):
        contender.opened()
    contender.close()


def test_entrants_share_a_process_and_differ_in_arguments(start: Start, rounds: Run, tmp_path: Path) -> None:
    shared = start("one")
    taken = rounds({"a": Entrant(shared, {"name": "a"}), "b": Entrant(shared, {"name": "b"})}, 0, 2, 0)
    assert logged(tmp_path) == ["a 0", "b 0", "b 1", "a 1"]
    assert taken["a"].opened is not None and taken["b"].opened is None
    assert taken["b"].psnr_db == [MOST_DB, MOST_DB]


def test_pictures_are_compared_with_those_of_the_entrants_own_reference(start: Start, rounds: Run) -> None:
    far = start("far", 0.3)
    entrants = {"a": Entrant(start("a")), "b": Entrant(far, reference="b"), "c": Entrant(far, reference="b")}
    taken = rounds(entrants, 0, 1, 0)
    assert [one.psnr_db for one in taken.values()] == [[], [], [MOST_DB]]


def test_one_that_finds_no_room_is_not_started(start: Start, rounds: Run, tmp_path: Path) -> None:
    taken = rounds({"a": Entrant(start("a")), "b": Entrant(start("b"), memory_bytes=10**18)}, 0, 2, 0)
    assert logged(tmp_path) == ["a 0", "a 1"]
    assert taken["b"].failed.startswith("its weights alone take 1000000000.0 GB of memory, and ")


def test_entrants_of_one_process_take_its_room_once(start: Start, rounds: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandemrt.bench.room.memory_bytes", lambda _: 15)
    shared, other = start("one"), start("other")
    shares = partial(Entrant, shared, memory_bytes=10)
    taken = rounds({"a": shares(), "b": shares(), "c": Entrant(other, memory_bytes=10)}, 0, 1, 0)
    assert [bool(one.failed) for one in taken.values()] == [False, False, True]


def test_what_is_seen_of_turns_is_told_with_them(start: Start, rounds: Run) -> None:
    joules = itertools.count(5.0, 2.0)
    probes = Probes({PROCESSORS_J: SimpleNamespace(joules=lambda: next(joules))})
    taken = rounds({"a": Entrant(start("a"))}, 1, 2, 0, probes=probes)["a"]
    assert taken.samples(PROCESSORS_J) == (2.0, 2.0)
    assert taken.tells(PROCESSORS_J) and not taken.tells("gpus_j")
    both = Taken()
    both.add(taken)
    assert both.samples(PROCESSORS_J) == (4.0,)


def test_an_interpreter_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="peer: its interpreter cannot be started"):
        Contender("peer", str(tmp_path / "python"), "ours.py", {})


def test_what_is_done_once_is_not_counted_as_opening(start: Start) -> None:
    contender = start("a", prepared_s=1000.0)()
    assert -1000 < contender.opened().figures["open_s"] < -900
    contender.close()


def test_closing_ends_the_process(start: Start) -> None:
    contender = start("a")()
    contender.opened()
    contender.close()
    with pytest.raises(ProcessLookupError):
        os.kill(contender.pid, 0)


def test_distances_of_pictures() -> None:
    white = np.ones((2, 2, 3), np.float32)
    assert psnr_db(white, white) == MOST_DB
    assert psnr_db(white, white * np.float32(0.9)) == pytest.approx(20, abs=1e-4)
