"""What is measured against each other: processes that paint the same picture when told to, one at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tandemrt.runtime.errors import BenchmarkError

from . import peers

SCRIPTS = Path(peers.__file__).parent
# A contender that opens, or paints a picture, for longer is given up.
LIMIT_S = 1800.0
# One that is told to end is waited for so long; its last words, when it has ended.
_CLOSING_S, _ENDING_S = 10.0, 5.0
# What a library says while it works is kept for the error it may end in.
_KEPT_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Answer:
    """What a contender told: figures by name, in seconds, MiB and MB, and words by component."""

    figures: Mapping[str, float]
    words: Mapping[str, str]

    def with_figures(self, further: Mapping[str, float]) -> Answer:
        """The same with further figures, such as what was seen of it meanwhile."""
        return Answer({**self.figures, **further}, self.words)


class Contender:
    """A contender's process, which opens its models when it starts.

    Another one may be opened meanwhile, but is not to be: they would slow each other down.
    """

    def __init__(self, name: str, python: str, script: str, job: Mapping[str, Any]) -> None:
        """Start it.

        Raises:
            BenchmarkError: the interpreter is not there.
        """
        self.name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process = subprocess.Popen(
                [python, "-u", str(SCRIPTS / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                # What it starts in its turn ends with it.
                start_new_session=True,
            )
        except OSError as error:
            raise BenchmarkError(name, f"its interpreter cannot be started ({error.strerror})", got=python) from error
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        if stdin is None or stdout is None or stderr is None:
            raise BenchmarkError(name, "has no pipes")
        self._stdin, self._stdout, self._said = stdin, stdout, _Tail(stderr)
        self._job, self._late = job, False

    def opened(self) -> Answer:
        """What opening took; waits until the models are open.

        Raises:
            BenchmarkError: it failed; the message ends with what it said.
        """
        return self._asked(json.dumps(self._job))

    def painted(self, seed: int, arguments: Mapping[str, Any], file: Path) -> Answer:
        """What the picture of this seed took, from its text to its pixels, which are saved to a file.

        arguments: what differs from the job. BenchmarkError where it failed.
        """
        return self._asked(json.dumps({"seed": seed, "arguments": dict(arguments), "file": str(file)}))

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End the process, whatever it does, with what it started."""
        for pipe in (self._stdin, self._stdout):
            with suppress(BrokenPipeError):
                pipe.close()
        with _after(_CLOSING_S, self._kill):
            self._exit_status()
        self._said.close()

    def _asked(self, line: str) -> Answer:
        status = None
        with _after(LIMIT_S, self._give_up):
            try:
                self._stdin.write(line + "\n")
                self._stdin.flush()
                answer = self._stdout.readline()
            except BrokenPipeError:
                answer = ""
            # One that ends on the way may leave half an answer.
            if not answer.endswith("\n"):
                status = self._exit_status()
        if self._late:
            raise BenchmarkError(self.name, f"took longer than {LIMIT_S:g} s", remedy="It was ended.")
        if status is not None:
            raise BenchmarkError(self.name, _ended(status), remedy=self._said.line())
        facts = json.loads(answer)
        if "error" in facts:
            raise BenchmarkError(self.name, facts["error"].rstrip("."))
        return Answer(facts["figures"], facts.get("words", {}))

    def _exit_status(self) -> int:
        """How the process ended; waits until it has, and ends what it left behind, while its number is its own."""
        if self._process.returncode is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self._kill()
        return self._process.wait()

    def _give_up(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


@contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Act when what is within takes longer."""
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _ended(status: int) -> str:
    """What a process's exit status says; nothing of ours kills one while it is asked."""
    if status == -signal.SIGKILL:
        return "was killed by the system, most likely because memory ran out"
    return f"ended with exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"


class _Tail:
    """The last a stream said, read as it comes so that nobody waits to say it."""

    def __init__(self, stream: IO[str]) -> None:
        self._kept, self._stream = "", stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream:
            for line in self._stream:
                self._kept = (self._kept + line)[-_KEPT_CHARACTERS:]

    def line(self) -> str:
        """The last line, when the stream has ended."""
        self.close()
        return self._kept.strip().rpartition("\n")[2]

    def close(self) -> None:
        """Let it end, unless somebody who was not ended still holds its other end."""
        self._thread.join(timeout=_ENDING_S)
