"""Running one build in a process of its own, from its parent's side."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import msgspec

from ..runtime import errors
from ..runtime.errors import EngineError, TandemError
from .job import Built, Job, Progress

LOG_TAIL_BYTES = 2000
# Python would look for modules in the working directory first, which may hold anything.
_WORKER = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "from tandemrt.engines.worker import main; sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))"
)


class _Message(msgspec.Struct):
    progress: tuple[str, int, int] | None = None
    error: tuple[str, str, str] | None = None
    os_error: tuple[int, str, str] | None = None
    built: Built | None = None


def build_apart(job: Job, progress: Progress, *, inherited: tuple[int, ...] = ()) -> Built:
    """Build `job` in a process that ends with this one, and is killed when anything is raised here meanwhile.

    inherited: file descriptors to keep open there, such as a lock that must outlive this process if the builder does.

    Raises:
        TandemError: what the builder raised.
        EngineError: the process ended without a word; the tail of its log is in the message.
        OSError: the folder cannot be written, or is full.
    """
    with tempfile.TemporaryFile() as log:
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as messages:
            try:
                process = _started(writing, log, inherited)
            finally:
                os.close(writing)
            try:
                _tell(process, job)
                built = _heard(messages, progress)
                if built is None:
                    raise _silent(job, process.wait(), _tail(log))
                return built
            finally:
                # One that has built needs not tidy up its memory. Ctrl-C reaches this process alone, and no builder is
                # asked to stop that can be stopped at once.
                process.kill()
                process.wait()


def _started(writing: int, log: IO[bytes], inherited: tuple[int, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _WORKER, str(writing), str(os.getpid())]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writing, *inherited), start_new_session=True
    )


def _tell(process: subprocess.Popen[bytes], job: Job) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # where it ended already, its log says why
            process.stdin.write(msgspec.json.encode(job))


def _heard(messages: IO[bytes], progress: Progress) -> Built | None:
    for message in _messages(messages):
        if message.progress is not None:
            progress(*message.progress)
        elif message.error is not None:
            raise _raised(*message.error)
        elif message.os_error is not None:
            raise OSError(*message.os_error)
        elif message.built is not None:
            return message.built
    return None


def _messages(messages: IO[bytes]) -> Iterator[_Message]:
    decoder = msgspec.json.Decoder(_Message)
    for line in messages:
        if line.endswith(b"\n"):  # not one that a dying process left unfinished
            yield decoder.decode(line)


def _raised(kind: str, where: str, message: str) -> TandemError:
    """The builder's error, in its own words."""
    found: Any = getattr(errors, kind, EngineError)
    error: TandemError = found(where, message)
    error.args = (message,)
    return error


def _silent(job: Job, status: int, tail: str) -> EngineError:
    told = f"; the end of its log: {tail}" if tail else ""
    if status == -signal.SIGKILL:
        what = f"the builder was killed, as the system does when memory runs out{told}"
        remedy = "Free memory, or build for fewer architectures or a narrower profile. The cache is as it was."
        return EngineError(f"{job.component} for {job.backend}", what, remedy=remedy)
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return EngineError(f"{job.component} for {job.backend}", f"the builder ended without a result ({how}){told}")


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(log.tell() - LOG_TAIL_BYTES, 0))
    return " ".join(log.read().decode("utf-8", "replace").split())
