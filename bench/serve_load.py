"""A server under load: `python -m tandemrt.bench.serve_load URL --pid PID --users 24 --seconds 600 --json FILE`.

Users ask `tandemrt serve`, or its deployment on Ray, for hand-overs and pictures, check the answers, and ask again;
who is refused tries again when the server says. Of hand-overs seed, step and plan have to be those asked for (a first
one, asked for beforehand, tells the plan), of pictures the seed. Locust runs the users (`pip install
"tandemrt[load]"`), in a process of its own. More users than the server runs and lets wait show what it refuses. What is
resident of the processes PID is looked at meanwhile: those that are to be watched, on this machine.

Of a Ray cluster of three nodes on this machine: `python tests/serve/ray_cluster.py BUNDLE -- python -m
tandemrt.bench.serve_load {url} --pid {pids} --json FILE`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.runtime import Handover
from tandemrt.runtime.cloud import JSON
from tandemrt.runtime.errors import ArgumentError, BenchmarkError, RequestError
from tandemrt.runtime.tokens import token_in_environment, token_in_file
from tandemrt.serve.command import TOKEN

from .arguments import add_report
from .figures import markdown_table, write_report
from .locust_users import GENERATIONS, HANDOFF
from .machine import described, machine_facts
from .memory import resident_mib
from .program import run_program

PROMPT = "a red circle left of a blue square"
NAMES = {HANDOFF: "hand-over", GENERATIONS: "picture"}
# Memory is looked at so often; what is told of it over time leaves out the first part, in which pools fill.
EVERY_S, FILLING = 2.0, 0.2
_PART_S, _ENDING_S, _ANSWER_S = 60.0, 900.0, 30.0
Seen = Sequence[tuple[float, float, str, str, int]]


def server_facts(url: str, token: str | None) -> dict[str, Any]:
    """What a server says that it is and serves.

    Raises:
        BenchmarkError: it does not answer, or is no server of ours.
    """

    def told(path: str) -> Any:
        request = urllib.request.Request(url.rstrip("/") + path)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return json.load(answer)

    try:
        server = told("/v2")
        return {**server, **told(f"/v2/models/{server['model']}")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(url, f"does not say what it serves ({error})", remedy="Start `tandemrt serve`.") from error


def plan_of(url: str, token: str | None, asked: Mapping[str, Any]) -> str:
    """The digest of the plan of hand-overs that are asked for so, by a first one.

    Raises:
        BenchmarkError: the server does not make it.
    """
    request = urllib.request.Request(url.rstrip("/") + HANDOFF, json.dumps(asked).encode(), {"Content-Type": JSON})
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_ENDING_S) as answer:
            return Handover.from_bytes(answer.read()).plan
    except (OSError, RequestError) as error:
        raise BenchmarkError(url, f"does not hand over what users will ask for ({error})") from error


def asked_of(server: Mapping[str, Any], steps: int, size: int | None) -> dict[str, dict[str, Any]]:
    """What is asked for, by path: half of the steps handed over, and a whole picture."""
    defaults, denoiser = server["defaults"], next(iter(server["components"]))
    width, height = (size, size) if size else (defaults["width"], defaults["height"])
    handed = {"steps": [[denoiser, steps]], "until": max(1, steps // 2), "width": width, "height": height}
    return {
        HANDOFF: {"prompt": PROMPT, **handed},
        GENERATIONS: {"prompt": PROMPT, "steps": {denoiser: steps}, "size": f"{width}x{height}"},
    }


@contextmanager
def watched(pids: Sequence[int]) -> Iterator[dict[int, list[tuple[float, float]]]]:
    """Seconds and resident MiB by process, until it ends, while the block runs."""
    samples: dict[int, list[tuple[float, float]]] = {pid: [] for pid in pids}
    began, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        alive = set(pids)
        while alive and not ended.is_set():
            now = {pid: _resident_mib(pid) for pid in sorted(alive)}
            for pid, mib in now.items():
                if mib is None:
                    alive.discard(pid)
                else:
                    samples[pid].append((time.monotonic() - began, mib))
            ended.wait(EVERY_S)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def seen_by_users(job: Mapping[str, Any]) -> Seen:
    """What users saw; see `locust_users`.

    Raises:
        BenchmarkError: Locust is not installed, or failed.
    """
    if find_spec("locust") is None:
        raise BenchmarkError("locust", "is not installed", remedy='Install it: pip install "tandemrt[load]"')
    command = [sys.executable, "-m", "tandemrt.bench.locust_users"]
    limit_s = job["seconds"] + _ENDING_S
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode:
        raise BenchmarkError("locust", f"ended with status {done.returncode}", remedy=done.stderr.strip()[-2000:])
    seen: Seen = json.loads(done.stdout)
    return seen


def answers_figures(seen: Seen, seconds: float) -> dict[str, Any]:
    """Answers by outcome, and of the good ones how many a second and their milliseconds."""
    good = [taken for _, taken, _, outcome, _ in seen if outcome == "ok"]
    figures: dict[str, Any] = {
        "answers": len(seen),
        "outcomes": dict(Counter(outcome for _, _, _, outcome, _ in seen).most_common()),
        "good_per_s": len(good) / seconds,
    }
    if good:
        p50, p90, p99, most = (float(value) for value in np.percentile(good, (50, 90, 99, 100)))
        figures["good_ms"] = {"p50": p50, "p90": p90, "p99": p99, "maximum": most}
    return figures


def parts_figures(seen: Seen, seconds: float) -> list[dict[str, Any]]:
    """The same of one minute after the other, the last as long as it is."""
    figures = []
    for begins in np.arange(0.0, seconds, _PART_S).tolist():
        ends = min(begins + _PART_S, seconds)
        part = [one for one in seen if begins <= one[0] < ends]
        figures.append({"from_s": begins, "to_s": ends, **answers_figures(part, ends - begins)})
    return figures


def memory_figures(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What is resident of a process: at first, at last, at most, and by how much it grows, pools being filled."""
    at_s, mib = np.array(samples).T
    later = at_s >= FILLING * at_s[-1]
    grows = float(np.polyfit(at_s[later], mib[later], 1)[0]) * 60 if later.sum() > 2 else None
    return {
        "begins_mib": float(mib[0]),
        "ends_mib": float(mib[-1]),
        "peak_mib": float(mib.max()),
        "grows_mib_per_minute": grows,
        "watched_s": float(at_s[-1]),
        "samples": [[round(at, 1), round(value, 2)] for at, value in samples],
    }


def load_figures(given: argparse.Namespace) -> dict[str, Any]:
    """Load the server as the command line says; what was seen.

    Raises:
        ArgumentError: the weights or the token are none, or a process to watch is not there.
        BenchmarkError: the server or Locust failed.
    """
    weights = given.weights.split(",")
    if len(weights) != 2 or not all(one.isdigit() for one in weights):
        raise ArgumentError("--weights", "not usable", got=given.weights, expected="two whole numbers, such as 3,1")
    for _, pid in given.pid:
        if _resident_mib(pid) is None:
            raise ArgumentError("--pid", "there is no such process", got=pid)
    file = given.token_file
    token = token_in_environment(TOKEN) if file is None else token_in_file(f"--token-file {file}", file)
    server = server_facts(given.url, token)
    asked = asked_of(server, given.steps, given.size)
    asked[HANDOFF]["plan"] = plan_of(given.url, token, asked[HANDOFF])
    facts: dict[str, Any] = {
        "machine": machine_facts(),
        "server": {name: server[name] for name in ("model", "version", "platform")},
        "users": given.users,
        "seconds": given.seconds,
        "weights": dict(zip((HANDOFF, GENERATIONS), map(int, weights), strict=True)),
        "asked": asked,
    }
    job = {name: facts[name] for name in ("users", "seconds", "weights", "asked")}
    with watched([pid for _, pid in given.pid]) as samples:
        answers = seen_by_users({**job, "url": given.url, "token": token})
    seen = [one for one in answers if one[0] < given.seconds]  # what comes after it counts nowhere
    kinds = {name: [one for one in seen if one[2] == path] for path, name in NAMES.items()}
    return {
        **facts,
        "locust": metadata.version("locust"),
        "by_kind": {name: answers_figures(some, given.seconds) for name, some in {**kinds, "both": seen}.items()},
        "by_minute": parts_figures(seen, given.seconds),
        "memory": [{"process": name, **memory_figures(samples[pid])} for name, pid in given.pid],
    }


def markdown(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    heads = ("asked for", "good", "a second", "p50, ms", "p90", "p99", "at most", "others")
    rows = [[name, *_cells(one)] for name, one in facts["by_kind"].items()]
    rows += [[f"all, minute {at + 1}", *_cells(one)] for at, one in enumerate(facts["by_minute"])]
    memory_heads = ("process", "at first, MiB", "at last", "at most", "growth a minute", "watched, s")
    names = ("begins_mib", "ends_mib", "peak_mib", "grows_mib_per_minute")
    memory = [
        [
            one["process"] or f"{at + 1}",
            *(f"{one[name]:.1f}" if one[name] is not None else "" for name in names),
            f"{one['watched_s']:.0f}",
        ]
        for at, one in enumerate(facts["memory"])
    ]
    server, steps = facts["server"], facts["asked"][HANDOFF]
    told = (
        f"{facts['users']} users for {facts['seconds']:g} s, without pauses but where they were told to wait; "
        f"{server['model']} on {server['platform']}, {steps['width']}x{steps['height']}, hand-overs after "
        f"{steps['until']} of {steps['steps'][0][1]} steps. Good answers were checked; times are theirs, as users saw "
        f"them. Growth is that after the first {100 * FILLING:.0f}%. Locust {facts['locust']} ran on the same "
        "machine. "
    )
    tables = (markdown_table(heads, rows, {7}), markdown_table(memory_heads, memory))
    return "\n".join(tables) + f"\n{told}{described(facts['machine'])}\n"


def process(told: str) -> tuple[str, int]:
    """A process to watch, and what it is called, if anything; ValueError where it is no number."""
    name, _, pid = told.rpartition("=")
    return name, int(pid)


def _resident_mib(pid: int) -> float | None:
    """What is resident of a process, None where it has ended."""
    try:
        return resident_mib(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None


def _cells(one: Mapping[str, Any]) -> list[str]:
    good = one["outcomes"].get("ok", 0)
    others = ", ".join(f"{count} {outcome}" for outcome, count in one["outcomes"].items() if outcome != "ok")
    times = one.get("good_ms", {})
    return [
        f"{good:,}",
        f"{one['good_per_s']:.2f}",
        *(f"{times[name]:,.0f}" for name in times),
        *([""] * (4 - len(times))),
        others,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the server, write FILE and a Markdown table beside it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL", help="such as http://127.0.0.1:8080")
    add_report(parser)
    parser.add_argument(
        "--pid", type=process, nargs="+", action="extend", default=[], help="processes to watch, numbers or NAME=NUMBER"
    )
    parser.add_argument("--users", type=int, default=24, metavar="N", help="default: 24")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help="default: 600")
    parser.add_argument("--weights", default="3,1", metavar="N,M", help="of hand-overs and of pictures (default 3,1)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of a picture (default 4)")
    parser.add_argument("--size", type=int, metavar="N", help="its side in pixels; the bundle's own by default")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=f"what the server wants to see; or ${TOKEN}")
    given = parser.parse_args(arguments)
    facts = load_figures(given)
    write_report(given.json, facts, markdown(facts))


if __name__ == "__main__":
    run_program(main)
