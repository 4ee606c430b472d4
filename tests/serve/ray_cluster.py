"""A Ray cluster of three nodes on this machine, in a network namespace with loopback only, that serves a bundle.

As a program, for root, it runs a command beside the cluster: `python tests/serve/ray_cluster.py BUNDLE -- COMMAND…`.
In it `{url}` is the server, whose token is in $TANDEMRT_TOKEN, and `{pids}` are the numbers of the processes of all
parts' replicas, each with its node and part before it: `first:unet=4711`. Every part is on two nodes.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemrt.runtime.bundle import Bundle

_NEW_NET, _GET_FLAGS, _SET_FLAGS, _UP = 0x40000000, 0x8913, 0x8914, 0x1
PORT = 8000
_STATUS = """
import json, sys, time, ray
from ray import serve
ray.init(sys.argv[1], namespace="serve", log_to_driver=False, logging_level="error")
while (application := serve.status().applications["tandemrt"]).status != "RUNNING":
    time.sleep(0.2)
print(json.dumps({name: one.replica_states.get("RUNNING", 0) for name, one in application.deployments.items()}))
"""
_START_S, _STORE_BYTES = 180, 100 << 20


@contextmanager
def loopback_alone() -> Iterator[None]:
    """This thread and what it starts in a network namespace of their own; OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if any(name != "lo" for _, name in socket.if_nameindex()) and libc.unshare(_NEW_NET):
            raise OSError(ctypes.get_errno(), "a network namespace of its own needs root, or `unshare --net` around it")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            asked = fcntl.ioctl(sock, _GET_FLAGS, struct.pack("16sh22x", b"lo", 0))
            flags = struct.unpack("16sh22x", asked)[1] | _UP
            fcntl.ioctl(sock, _SET_FLAGS, struct.pack("16sh22x", b"lo", flags))
        yield
    finally:
        libc.setns(before, 0)
        os.close(before)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    url, token: of its server. address: of its head. nodes: their processes by name. folder: has their logs.
    """

    url: str
    token: str
    address: str
    nodes: Mapping[str, subprocess.Popen[bytes]]
    environment: Mapping[str, str]
    folder: Path

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Deploy a Serve config, as `serve run --non-blocking` does, until all run and the server is ready."""
        file = self.folder / "serve.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        command = [_program("serve"), "run", "--address", self.address, "--non-blocking", str(file)]
        with (self.folder / "deploy.log").open("wb") as log:
            subprocess.run(command, env=self.environment, check=True, stdout=log, stderr=log, timeout=_START_S)
        self.replicas()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the server is ready; TimeoutError where it is not in time."""
        ends = time.monotonic() + _START_S
        while time.monotonic() < ends:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise TimeoutError(f"{self.url}: not ready after {_START_S} s; see {self.folder}")

    def replicas(self) -> dict[str, int]:
        """How many replicas of each deployment run, when all do that are to."""
        command = [sys.executable, "-c", _STATUS, self.address]
        done = subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=_START_S)
        counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return counts

    def parts(self, name: str) -> list[tuple[str, int]]:
        """The deployments that have a replica on a node, and the numbers of the replicas' processes."""
        found = []
        for pid in descendants(self.nodes[name].pid):
            with suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                if title.startswith("ray::ServeReplica:"):
                    found.append((title.rpartition(":")[2].partition(".")[0], pid))
        return sorted(found)

    def kill(self, name: str) -> None:
        """Kill a node with all that runs on it, at once."""
        node = self.nodes[name]
        for pid in (*descendants(node.pid), node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()


@contextmanager
def cluster(names: Sequence[str] = ("head", "first", "second")) -> Iterator[Cluster]:
    """A cluster whose first node is its head; each has a resource of its own name."""
    # Short, since sockets lie in it.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    token, ray_token = secrets.token_hex(16), secrets.token_hex(32)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Three nodes of one machine would each see all of its memory used.
        "RAY_memory_monitor_refresh_ms": "0",
        "TANDEMRT_TOKEN": token,
    }
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    # Ray refuses an address that a cluster on this machine has, also in another namespace.
    port = 20_000 + secrets.randbelow(10_000)
    up = Cluster(f"http://127.0.0.1:{PORT}", token, f"127.0.0.1:{port}", nodes, environment, folder)
    try:
        for index, name in enumerate(names):
            with (folder / f"{name}.log").open("wb") as log:
                nodes[name] = subprocess.Popen(
                    [*_start(index, port, folder), "--resources", json.dumps({name: 100})],
                    env=environment, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            _wait_until_started(name, nodes[name], folder / f"{name}.log")
        yield up
    finally:
        for name in reversed(nodes):
            up.kill(name)
        shutil.rmtree(folder, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, pending = list[int](), [pid]
    while pending:
        pending += (own := children.get(pending.pop(), []))
        found += own
    return found


def on_two_nodes(*names: str) -> list[dict[str, Any]]:
    """Deployments of these names, each with replicas on two nodes; the server is where its clients are."""
    http = {"name": "http", "ray_actor_options": {"num_cpus": 1, "resources": {"head": 1}}}
    return [http, *({"name": name, "num_replicas": 2, "max_replicas_per_node": 1} for name in names)]


def config_of(bundle: Path, deployments: Sequence[Mapping[str, Any]] = (), **arguments: Any) -> dict[str, Any]:
    """A Serve config of a bundle."""
    application = {
        "name": "tandemrt",
        "route_prefix": "/",
        "import_path": "tandemrt.serve.ray_app:build",
        "args": {"bundle": str(bundle), **arguments},
        "deployments": list(deployments),
    }
    return {"proxy_location": "HeadOnly", "http_options": {"port": PORT}, "applications": [application]}


def _start(index: int, port: int, folder: Path) -> list[str]:
    ports = {"dashboard-agent-listen-port": 52_365, "metrics-export-port": 52_465, "runtime-env-agent-port": 52_565}
    common = [f"--{name}={port + index}" for name, port in ports.items()]
    common += ["--num-cpus=16", f"--object-store-memory={_STORE_BYTES}", "--block", "--disable-usage-stats"]
    if index == 0:
        head = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"]
        return [_program("ray"), "start", *head, "--include-dashboard=false", *common]
    return [_program("ray"), "start", f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1", *common]


def _wait_until_started(name: str, node: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a node is up: several that start at once take each other's ports."""
    ends = time.monotonic() + _START_S
    while b"Ray runtime started" not in log.read_bytes():
        if node.poll() is not None or time.monotonic() > ends:
            raise TimeoutError(f"{name}: Ray did not start\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def main() -> int:
    """See the module."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    bundle, command = Path(sys.argv[1]).resolve(), sys.argv[3:]
    parts = ("text", *Bundle.open(bundle).manifest.names("denoiser"), "decoder")
    with loopback_alone(), cluster() as up:
        up.deploy(config_of(bundle, on_two_nodes(*parts)))
        pids = [f"{node}:{part}={pid}" for node in up.nodes for part, pid in up.parts(node)]
        told = {"{url}": [up.url], "{pids}": pids}
        words = [word for one in command for word in told.get(one, [one])]
        return subprocess.run(words, env=up.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
