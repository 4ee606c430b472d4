"""A server of `tandemrt serve` in a process of its own, for as long as it is asked."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from tandemrt.runtime.errors import BenchmarkError

HOST = "127.0.0.1"
# It opens models and paints a picture first.
_READY_S, _ENDING_S = 600.0, 30.0
_KEPT_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens, and the number of its process."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


@contextmanager
def served(bundle: Path, target: str, threads: int | None) -> Iterator[Server]:
    """A server of a bundle that is ready; it is told to end, and has ended, behind.

    Raises:
        BenchmarkError: it ended before it was ready, or took too long.
    """
    port = _free_port()
    words = ["--target", target, "--host", HOST, "--port", str(port)]
    words += [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "-m", "tandemrt.runtime.cli", "serve", str(bundle), *words]
    # One that is set for other servers would be asked for.
    environment = {name: value for name, value in os.environ.items() if name != "TANDEMRT_TOKEN"}
    with TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said, env=environment) as process:
        try:
            _wait_until_ready(process, port, said)
            yield Server(port, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
    ends = time.monotonic() + _READY_S
    while not _is_ready(port):
        if process.poll() is not None or time.monotonic() > ends:
            said.seek(max(0, said.seek(0, os.SEEK_END) - _KEPT_BYTES))
            told = said.read().decode(errors="replace").strip()
            what = "was not ready in time" if process.returncode is None else f"ended with status {process.returncode}"
            raise BenchmarkError("tandemrt serve", what, remedy=told)
        time.sleep(0.05)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
