"""The program `tandemrt`: finds a command, runs it, and turns what happened into an exit status."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

from ..errors import ArgumentError, TandemError
from .reporter import ConsoleReporter, Reporter, one_line

INTERRUPTED, TERMINATED = 130, 143


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a command lives; its module is imported only when the command is named.

    extras: what to install when an import of the command's fails. plans: whether it can say beforehand what it will do.
    group: whether the module holds no command but `COMMANDS`, a table of those that the next word chooses from, and
        perhaps `DEFAULT`, the one that is meant where the next word is none of them.
    """

    module: str
    help: str
    extras: str
    plans: bool = True
    group: bool = False


COMMANDS: Mapping[str, Entry] = {
    "export": Entry("tandemrt.export.command", "turn a checkpoint into a verified bundle", "export,cpu"),
    "build-engine": Entry("tandemrt.engines.command", "compile a bundle's models for what they run on", "engines"),
    "calibrate": Entry("tandemrt.calibrate.command", "find what suits a bundle by measuring it", "cpu", group=True),
    "generate": Entry("tandemrt.runtime.cli.generate", "paint pictures from prompts with a bundle", "cpu"),
    "bench": Entry("tandemrt.bench.command", "measure a bundle beside its peers, and report", "cpu,bench", group=True),
    "serve": Entry("tandemrt.serve.command", "serve a bundle over HTTP", "cpu,serve"),
    "export-triton": Entry("tandemrt.engines.triton_command", "write a model repository for Triton", "cpu"),
    "inspect": Entry("tandemrt.runtime.cli.inspect_bundle", "show what a bundle holds", "cpu", plans=False),
    "verify": Entry("tandemrt.runtime.cli.verify_bundle", "check that a bundle is what was exported", "export,cpu"),
    "doctor": Entry("tandemrt.runtime.cli.doctor", "show what this machine can run, and what is missing", "cpu", False),
    "demo": Entry(
        "tandemrt.bench.demo", "export and paint with the small trained models that come along", "export,cpu"
    ),
}


class Command(Protocol):
    """What a command's module offers.

    It may also have `plan_facts(plan)`, what `--print-plan` shows where that is more than the plan's fields,
    `plan_lines(facts)`, the lines a person is shown of these,
    `summary(result)`, the lines a person is shown of what `run` returned, and `status(result)`, the exit status.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments; may set the parser's description and epilog."""

    def plan_from_arguments(self, namespace: argparse.Namespace) -> Any:
        """The parsed arguments as a frozen dataclass.

        Raises:
            ArgumentError: an argument cannot be used.
        """

    def run(self, plan: Any, reporter: Reporter) -> Mapping[str, Any]:
        """Do the work; what is returned can be written as JSON.

        Raises:
            TandemError: it failed.
        """


class UsageError(ArgumentError):
    """The command line itself cannot be read; argparse words the message."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a container that is stopped; what Ctrl-C leaves tidy is left tidy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tandemrt` with these arguments (the process's own by default) and return its exit status."""
    if argv is None:
        signal.signal(signal.SIGTERM, _terminate)
    arguments = _with_default(sys.argv[1:] if argv is None else list(argv))
    try:
        return _guarded(arguments)
    except BrokenPipeError:
        # The reader has gone, as with `| head`.
        _close_stdout()
        return 1


def _guarded(arguments: Sequence[str]) -> int:
    """Run a command; every exception but a broken pipe ends as one line on stderr and a status."""
    names, entry = _named_command(arguments)
    program = " ".join(("tandemrt", *names))
    try:
        status = _run(names, arguments)
        sys.stdout.flush()
        return status
    except SystemExit as ended:  # argparse, after --help or --version
        return int(ended.code or 0)
    except BrokenPipeError:
        raise
    except _Terminated:
        sys.stderr.write(f"{program}: terminated\n")
        return TERMINATED
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return INTERRUPTED
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        message = _message(error, entry, program)
        sys.stderr.write(f"{program}: {one_line(message)}\n")
        status = error.exit_status if isinstance(error, TandemError) else 1
        if _is_of_a_full_stdout(error):
            _close_stdout()
        elif "--json" in arguments:
            _write_json({"error": {"type": type(error).__name__, "message": message, "exit_status": status}})
        return status


def _run(names: Sequence[str], arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="tandemrt",
        description="Turn Stable-Diffusion-family checkpoints into verified ONNX bundles and paint with them, "
        "without PyTorch.",
        epilog="`tandemrt COMMAND --help` explains a command. Try `tandemrt demo`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    named, command = _declared(parser, COMMANDS, names)
    namespace = parser.parse_args(arguments)
    if command is None:
        named.print_help(sys.stderr)
        return ArgumentError.exit_status
    return _execute(command, namespace)


def _declared(
    parser: argparse.ArgumentParser, table: Mapping[str, Entry], names: Sequence[str]
) -> tuple[argparse.ArgumentParser, Command | None]:
    """Tell a parser of a table's commands, and of the arguments of the one named; its parser, and the command.

    names: the words that name it; where they end at a table, there is no command yet.
    """
    choices = parser.add_subparsers(metavar="COMMAND", dest="command", title="commands", parser_class=_Parser)
    for name, entry in table.items():
        choices.add_parser(name, help=entry.help, add_help=name in names[:1], allow_abbrev=False)
    if not names:
        return parser, None
    entry, named = table[names[0]], choices.choices[names[0]]
    named.formatter_class = _Formatter
    named.description = entry.help[0].upper() + entry.help[1:] + "."
    if entry.group:
        return _declared(named, _table(entry), names[1:])
    command = cast(Command, importlib.import_module(entry.module))
    _declare(named, entry, command)
    return named, command


def _declare(parser: argparse.ArgumentParser, entry: Entry, command: Command) -> None:
    """The command's own arguments and those every command has."""
    command.add_arguments(parser)
    group = parser.add_argument_group("output and errors")
    group.add_argument("--json", action="store_true", help="write one JSON document to stdout, all else to stderr")
    if entry.plans:
        group.add_argument("--print-plan", action="store_true", help="show what would be done, and stop")
    group.add_argument("--traceback", action="store_true", help="show where in the program an error arose")


def _execute(command: Command, namespace: argparse.Namespace) -> int:
    plan = command.plan_from_arguments(namespace)
    if getattr(namespace, "print_plan", False):
        facts = getattr(command, "plan_facts", _fields)(plan)
        if namespace.json or not hasattr(command, "plan_lines"):
            _write_json(facts)
            return 0
        planned: Iterable[str] = command.plan_lines(facts)
        for line in planned:
            sys.stdout.write(one_line(line) + "\n")
        return 0
    with ConsoleReporter(sys.stderr if namespace.json else sys.stdout, sys.stderr) as reporter:
        result = command.run(plan, reporter)
        if namespace.json:
            _write_json(result)
        elif hasattr(command, "summary"):
            lines: Iterable[str] = command.summary(result)
            for line in lines:
                reporter.line(line)
    status: Callable[[Mapping[str, Any]], int] | None = getattr(command, "status", None)
    return 0 if status is None else status(result)


def _with_default(arguments: list[str]) -> list[str]:
    """The arguments with their group's default command, where it has one and they name none and ask for no help."""
    names, entry = _named_command(arguments)
    if entry is None or not entry.group:
        return arguments
    default = getattr(importlib.import_module(entry.module), "DEFAULT", None)
    after = arguments.index(names[-1]) + 1
    if default is None or not arguments[after:] or arguments[after] in ("-h", "--help"):
        return arguments
    return [*arguments[:after], default, *arguments[after:]]


def _named_command(arguments: Sequence[str]) -> tuple[tuple[str, ...], Entry | None]:
    """The words that name a command, with its entry: the first that are no options, as those before take no values."""
    names: tuple[str, ...] = ()
    entry: Entry | None = None
    table = COMMANDS
    for word in arguments:
        if word.startswith("-"):
            continue
        if word not in table:
            break
        entry, names = table[word], (*names, word)
        if not entry.group:
            break
        table = _table(entry)
    return names, entry


def _table(entry: Entry) -> Mapping[str, Entry]:
    """The commands of a group."""
    table: Mapping[str, Entry] = importlib.import_module(entry.module).COMMANDS
    return table


def _message(error: Exception, entry: Entry | None, program: str) -> str:
    if isinstance(error, UsageError):
        return f"{error.what}. See `{program} --help`."
    if isinstance(error, TandemError):
        return str(error)
    if isinstance(error, ImportError) and entry is not None and not (error.name or "tandemrt").startswith("tandemrt"):
        install = f'pip install "tandemrt[{entry.extras}]"'
        return f"needs {error.name}, which cannot be imported here. Install it: {install}"
    if _is_of_a_full_stdout(error):
        return "standard output: cannot be written (no space left). Free some space."
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"failed unexpectedly ({detail}). Run again with --traceback to see where."


def _is_of_a_full_stdout(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None


def _close_stdout() -> None:
    """Send what is still in the buffer nowhere: Python would try to write it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _fields(plan: Any) -> Any:
    import msgspec  # noqa: PLC0415 (most commands end without it)

    return msgspec.to_builtins(plan, enc_hook=str)


def _write_json(document: object) -> None:
    # ASCII escapes: neither stdout's encoding nor a lone surrogate in a prompt can make the document unreadable.
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, so that they end as every other error does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("command line", message)


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves those with indented lines, such as examples, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            part if "\n " in part else textwrap.fill(" ".join(part.split()), width) for part in paragraphs
        )


class _Version(argparse.Action):
    """Looks the version up when asked for it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version  # noqa: PLC0415 (slower than the whole start)

        sys.stdout.write(f"tandemrt {version('tandemrt')}\n")
        parser.exit()
