"""The process that builds one engine; `process.py` starts it, with the job as JSON on its stdin.

Builders are native code that can take all memory or crash: here they take nobody with them. What they print goes to
this process's output, which its parent keeps; messages go to a pipe, one line of JSON each.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.errors import TandemError
from .job import Job

BUILDERS = {
    "tensorrt-rtx": "tandemrt.engines.tensorrt",
    "tensorrt": "tandemrt.engines.tensorrt",
    "openvino": "tandemrt.engines.openvino",
    "onnxruntime": "tandemrt.engines.onnxruntime",
}
_PR_SET_PDEATHSIG = 1
_FIRST_TO_BE_KILLED = "800"
_STATUS = Path("/proc/self/status")


def main(pipe: int, parent: int) -> int:
    """Build the job on stdin and say what came of it; the exit status is 0 when that could be said.

    pipe: the file descriptor that messages go to. parent: the process that this one is not to outlive.
    """
    _die_with(parent)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)

    def say(**message: Any) -> None:
        os.write(pipe, msgspec.json.encode(message) + b"\n")

    try:
        builder = importlib.import_module(BUILDERS[job.backend])
        built = builder.build(job, lambda label, done, total: say(progress=(label, done, total)))
    except TandemError as error:
        say(error=(type(error).__name__, error.where, str(error)))
    except OSError as error:
        say(os_error=(error.errno or 0, error.strerror or str(error), str(error.filename or job.folder)))
    else:
        say(built=msgspec.structs.replace(built, peak_memory_bytes=_peak_memory_bytes()))
    return 0


def _peak_memory_bytes() -> int:
    """The most memory this process has had at once.

    Linux tells it of this program alone; `getrusage` counts what the parent had when it made this process, too.
    """
    if _STATUS.exists():
        lines = _STATUS.read_text("ascii", "replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _die_with(parent: int) -> None:
    """End when the parent does, even one that was killed; and be what the system kills first when memory runs out."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    with contextlib.suppress(OSError):  # not Linux, or a container that lets nobody write there
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_BE_KILLED, encoding="ascii")
