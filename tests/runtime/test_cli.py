"""The program: which command runs, and how every end of it looks from outside."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tandemrt.calibrate.command import COMMANDS as CALIBRATIONS
from tandemrt.runtime.cli import main, program
from tandemrt.runtime.cli.columns import aligned
from tandemrt.runtime.cli.reporter import ConsoleReporter, Reporter, one_line
from tandemrt.runtime.errors import BundleError, RequestError

from .tiny_bundle import write_tiny_bundle

# numpy, Pillow and msgspec come with the package itself, which offers `Pipeline` by name.
NEVER_FOR_HELP = {"torch", "onnxruntime", "onnx", "rich", "tokenizers"}
NEVER_FOR_HELP |= {"tandemrt.export", "tandemrt.calibrate", "tandemrt.bench"}


@dataclass(frozen=True)
class FakePlan:
    folder: Path
    times: int


class FakeCommand(ModuleType):
    """A command whose `run` does what the test says."""

    def __init__(self) -> None:
        super().__init__("fake_command")
        self.failure: BaseException | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", type=Path)
        parser.add_argument("--times", type=int, default=1)

    def plan_from_arguments(self, namespace: argparse.Namespace) -> FakePlan:
        return FakePlan(namespace.folder, namespace.times)

    def run(self, plan: FakePlan, reporter: Reporter) -> Mapping[str, Any]:
        reporter.progress("working", 1, 1)
        reporter.line("a line")
        reporter.warn("a warning")
        if self.failure is not None:
            raise self.failure
        return {"times": plan.times}

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        yield f"did it {result['times']} times"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCommand:
    command = FakeCommand()
    monkeypatch.setitem(sys.modules, "fake_command", command)
    monkeypatch.setattr(program, "COMMANDS", {"fake": program.Entry("fake_command", "do nothing", "export,cpu")})
    return command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    write_tiny_bundle(folder)
    return folder


def test_results_go_to_stdout_and_the_rest_to_stderr(fake: FakeCommand, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "x", "--times", "3"]) == 0
    assert capsys.readouterr() == ("a line\ndid it 3 times\n", "working: 1/1\nwarning: a warning\n")


def test_json_is_all_there_is_on_stdout(fake: FakeCommand, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "x", "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == {"times": 1}
    assert stderr == "working: 1/1\na line\nwarning: a warning\n"


def test_print_plan_runs_nothing(fake: FakeCommand, capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = AssertionError("ran")
    assert main(["fake", "x", "--print-plan"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "x", "times": 1}


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        (BundleError("b", "damaged", got=1, expected="2"), 1, "tandemrt fake: b: damaged, got 1, expected 2."),
        (RequestError("seed", "not usable"), 2, "tandemrt fake: seed: not usable."),
        (RequestError("a\nb", "c\x1b[2J"), 2, "tandemrt fake: a b: c\\x1b[2J."),
        (KeyboardInterrupt(), 130, "tandemrt fake: interrupted"),
        (
            ValueError("odd"),
            1,
            "tandemrt fake: failed unexpectedly (ValueError: odd). Run again with --traceback to see where.",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            'tandemrt fake: needs torch, which cannot be imported here. Install it: pip install "tandemrt[export,cpu]"',
        ),
    ],
)
def test_a_failure_is_one_line(
    fake: FakeCommand, capsys: pytest.CaptureFixture[str], failure: BaseException, status: int, line: str
) -> None:
    fake.failure = failure
    assert main(["fake", "x"]) == status
    assert capsys.readouterr().err.splitlines()[2:] == [line]


@pytest.mark.parametrize("arguments", [["--version"], ["doctor"], ["doctor", "--json"]])
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from tandemrt.runtime.cli import main; sys.exit(main())", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("standard output: cannot be written (no space left). Free some space.")


def test_termination_ends_as_an_interruption_does() -> None:
    """As when a container is stopped: context managers run, and the status is the shell's for SIGTERM."""
    code = (
        "import os, signal, sys\n"
        "from tandemrt.runtime.cli import main, program\n"
        "program._run = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv[1:] = ['doctor']\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "tandemrt doctor: terminated\n")


def test_our_own_missing_module_is_not_blamed_on_an_extra(
    fake: FakeCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = ModuleNotFoundError("No module named 'tandemrt.x'", name="tandemrt.x")
    assert main(["fake", "x"]) == 1
    assert "pip install" not in capsys.readouterr().err


def test_json_says_what_failed(fake: FakeCommand, capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = RequestError("seed", "not usable", got=-1)
    assert main(["fake", "x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": {"type": "RequestError", "message": "seed: not usable, got -1.", "exit_status": 2}
    }


def test_traceback_on_request(fake: FakeCommand, capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = ValueError("odd")
    assert main(["fake", "x", "--traceback"]) == 1
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert "in run" in stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fake"], "tandemrt fake: the following arguments are required: folder. See `tandemrt fake --help`."),
        (["fake", "x", "--nope"], "tandemrt fake: unrecognized arguments: --nope. See `tandemrt fake --help`."),
        (
            ["fake", "x", "--times", "many"],
            "tandemrt fake: argument --times: invalid int value: 'many'. See `tandemrt fake --help`.",
        ),
        (["fake", "x", "--tim", "2"], "tandemrt fake: unrecognized arguments: --tim 2. See `tandemrt fake --help`."),
    ],
)
def test_unreadable_command_lines(
    fake: FakeCommand, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("tandemrt: argument COMMAND: invalid choice: 'paint'")
    assert stderr.count("\n") == 1


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


EVERY_COMMAND = {
    **{(name,): entry for name, entry in program.COMMANDS.items() if not entry.group},
    **{("calibrate", name): entry for name, entry in CALIBRATIONS.items()},
}


@pytest.mark.parametrize(("words", "entry"), EVERY_COMMAND.items(), ids=map(" ".join, EVERY_COMMAND))
def test_every_command_explains_itself(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], entry: program.Entry
) -> None:
    assert main([*words, "--help"]) == 0
    stdout = capsys.readouterr().out
    assert f"usage: tandemrt {' '.join(words)}" in stdout
    assert entry.plans == ("--print-plan" in stdout)
    assert "--json" in stdout


def test_a_group_of_commands_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--help"]) == 0
    stdout = capsys.readouterr().out
    assert [name for name in CALIBRATIONS if f"\n    {name} " not in stdout] == []
    assert main(["calibrate"]) == 2
    assert capsys.readouterr().err == stdout
    assert main(["calibrate", "paint"]) == 2
    assert capsys.readouterr().err.startswith("tandemrt calibrate: argument COMMAND: invalid choice: 'paint'")


@pytest.mark.parametrize("name", ["export", "generate", "inspect", "verify", "doctor"])
def test_a_command_shows_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    main([name, "--help"])
    assert f"\n  tandemrt {name}" in capsys.readouterr().out


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from tandemrt.runtime.cli import main\n"
        "statuses = main(['--help']), main(['--version'])\n"
        f"print(*statuses, sorted({NEVER_FOR_HELP!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *_, version, last = done.stdout.splitlines()
    assert version.startswith("tandemrt ")
    assert last == "0 0 []"


def test_a_reader_that_leaves_ends_it_quietly(bundle: Path) -> None:
    command = [sys.executable, "-m", "tandemrt.runtime.cli", "inspect", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_plain_progress_speaks_when_it_begins_and_ends_and_estimates_between(monkeypatch: pytest.MonkeyPatch) -> None:
    status = io.StringIO()
    seconds = iter([0.0, 1.0, 2.0, 6.0, 7.0, 7.5])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    with ConsoleReporter(io.StringIO(), status) as reporter:
        for done in range(1, 6):
            reporter.progress("one", done, 5)
        reporter.progress("two", 1, 2)
    assert status.getvalue().splitlines() == ["one: 1/5", "one: 4/5, about 0:00:02 left", "one: 5/5", "two: 1/2"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_is_gone_before_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    results, status = io.StringIO(), Terminal()
    with ConsoleReporter(results, status) as reporter:
        reporter.progress("paint [red]", 1, 4)
        assert "\x1b[2K" not in status.getvalue()
        reporter.line("out/x.png")
        assert "\x1b[2K" in status.getvalue()
        reporter.progress("paint [red]", 2, 4)
    assert "paint [red]" in status.getvalue()
    assert results.getvalue() == "out/x.png\n"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    status = Terminal()
    ConsoleReporter(io.StringIO(), status).progress("paint", 1, 4)
    assert status.getvalue() == "paint: 1/4\n"


def test_one_line_lets_nothing_steer_a_terminal() -> None:
    assert one_line("ein Würfel\r\nrot\x1b]0;title\x07 \u202e") == "ein Würfel rot\\x1b]0;title\\x07 \\u202e"


def test_columns_stand_under_each_other() -> None:
    assert aligned([("a", "bb", "c"), ("aaa", "b", "")], indent=" ") == [" a    bb  c", " aaa  b"]
