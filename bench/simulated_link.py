"""Downloads over a simulated link, for an interpreter of its own: `python simulated_link.py MBIT MS ROUNDS FILE...`.

Two networks of their own (Linux's namespaces) have a tunnel each, between whose ends a process lets every packet wait
for as long as a line of MBIT Mbit/s takes to send it, and for half of the round trip of MS milliseconds: each way by
itself, in order, and none is lost. Handshakes, slow start and windows are the kernel's own, with CUBIC.

In each round every FILE is fetched over HTTP, on a new connection and once more on the same one. What is written is
JSON: for each FILE by its name milliseconds in the order of the rounds, until connected, and of either download.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import http.client
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote

SERVER, CLIENT, PORT = "10.77.0.1", "10.77.0.2", 8080
# How the server goes about congestion: as Linux does by default.
CONTROL = b"cubic"
LIMIT_S = 120.0
# Of linux/sched.h, linux/if_tun.h and linux/prctl.h.
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PR_SET_PDEATHSIG = 1
_PACKET, _AT_ONCE = 1 << 16, 64


def enter_network() -> None:
    """Be in a network of its own, which has no devices; OSError where the system does not allow it."""
    uid, gid = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWNET)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        # Who may not: as the first user of a world of his own.
        _unshare(CLONE_NEWUSER | CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path("/proc/self", name).write_text(text, encoding="ascii")
    # No connection is to know what one before it has seen.
    Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1", encoding="ascii")


def tunnel(own: str, other: str) -> int:
    """A device of this network that leads from one address to another; what goes through it is read and written."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", b"link", IFF_TUN | IFF_NO_PI))
    for words in (("address", "add", own, "peer", other), ("link", "set", "up")):
        subprocess.run(["ip", *words, "dev", "link"], check=True)
    return end


def carry(ends: tuple[int, int], bytes_per_s: float, delay_s: float) -> NoReturn:
    """Carry packets from each end to the other."""
    others = dict(zip(ends, reversed(ends), strict=True))
    # Of what goes to an end: when it is due, in order; and until when the line is busy with sending.
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
    sending = dict.fromkeys(ends, 0.0)
    while True:
        now = time.monotonic()
        for end, packets in waiting.items():
            while packets and packets[0][0] <= now:
                os.write(end, packets.popleft()[1])
        due = min((packets[0][0] for packets in waiting.values() if packets), default=None)
        readable, _, _ = select.select(ends, (), (), None if due is None else max(0.0, due - time.monotonic()))
        for end in readable:
            to = others[end]
            for packet in _read(end):
                sending[to] = max(time.monotonic(), sending[to]) + len(packet) / bytes_per_s
                waiting[to].append((sending[to] + delay_s, packet))


def serve(listener: socket.socket, files: Mapping[str, bytes]) -> NoReturn:
    """Answer every GET of a file by its name, one connection after the other."""
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as asked:
            while line := asked.readline():
                while asked.readline().strip():
                    pass
                body = files[unquote(line.split()[1].decode()).lstrip("/")]
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def fetched(files: Mapping[str, bytes], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by file: `connect_ms`, `fresh_ms` from the beginning to the last byte, `kept_ms` of once more."""
    taken: dict[str, dict[str, list[float]]] = {
        name: {"connect_ms": [], "fresh_ms": [], "kept_ms": []} for name in files
    }
    for _ in range(rounds):
        for name, body in files.items():
            connection = http.client.HTTPConnection(SERVER, PORT, timeout=LIMIT_S)
            began = time.perf_counter()
            connection.connect()
            connected = time.perf_counter()
            _require_same(name, body, connection)
            fresh = time.perf_counter()
            _require_same(name, body, connection)
            kept = time.perf_counter()
            connection.close()
            spans = {"connect_ms": connected - began, "fresh_ms": fresh - began, "kept_ms": kept - fresh}
            for part, seconds in spans.items():
                taken[name][part].append(seconds * 1e3)
    return taken


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mbit", type=float)
    parser.add_argument("round_trip_ms", type=float)
    parser.add_argument("rounds", type=int)
    parser.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    files = {path.name: path.read_bytes() for path in given.files}
    children: list[int] = []
    try:
        enter_network()
        there = tunnel(SERVER, CLIENT)
        listener = socket.create_server((SERVER, PORT))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONTROL)
        children.append(_child(lambda: serve(listener, files)))
        enter_network()
        here = tunnel(CLIENT, SERVER)
        children.append(_child(lambda: carry((there, here), given.mbit * 1e6 / 8, given.round_trip_ms / 2e3)))
        print(json.dumps(fetched(files, given.rounds)))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _unshare(flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")


def _read(end: int) -> Iterator[bytes]:
    """The packets that are there, some at most."""
    with suppress(BlockingIOError):
        for _ in range(_AT_ONCE):
            yield os.read(end, _PACKET)


def _child(work: Callable[[], NoReturn]) -> int:
    """The number of a process that does nothing else, and ends with this one."""
    child = os.fork()
    if child:
        return child
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        work()
    finally:
        os._exit(1)


def _require_same(name: str, body: bytes, connection: http.client.HTTPConnection) -> None:
    connection.request("GET", f"/{quote(name)}")
    if connection.getresponse().read() != body:
        raise ValueError(f"{name}: arrived otherwise than it was sent")


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"no link can be simulated here: {error}")
