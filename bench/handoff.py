"""What a hand-over costs beside one process: `python -m tandemrt.bench.handoff BUNDLE --json FILE`.

A server process of the bundle, on this machine. In each round the same steps run here, and there, as the edge client
asks for them: the first ones from noise, then further ones from the state that those left, which travels both ways. The
states have to be the same bit for bit; what the second takes longer is the cost. Beside it stands what its parts take.
Take the figures on a quiet machine, of a bundle whose steps are short, as a step's own spread is in the difference: its
smallest denoiser runs one, without guidance. By the server's clock the cost is what it does not say that it took.
Whole pictures, whose first steps the server runs, then tell what a hand-over in float16 changes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandemrt.runtime import Cloud, Handover, Output, Pipeline
from tandemrt.runtime.errors import ArgumentError, BenchmarkError
from tandemrt.runtime.plan import Schedule, compile_plan

from .arguments import add_report, add_rounds
from .figures import cell, markdown_table, spread, write_report
from .handoff_half import half_figures, half_markdown
from .handoff_parts import PARTS, Exchange, exchanged, own_parts
from .machine import described, machine_facts
from .program import run_program
from .rounds import rotated
from .servers import served

# Of the median, for the latent of one picture, (1, C, h, w).
GOALS, GOAL_LATENT = {"cost_ms": 3.0}, (1, 4, 64, 64)
PROMPT = "a red circle left of a blue square"
CASES = ("the first step", "a further step")


@dataclass(frozen=True, slots=True)
class Sides:
    """A pipeline here, a server of the same bundle, and what both are asked for."""

    pipe: Pipeline
    cloud: Cloud
    asked: Mapping[str, Any]
    plan: str

    def here(self, seed: int, until: int, start: Handover | None) -> Handover:
        """The steps in this process."""
        output: Output = self.pipe(**self.asked, seed=seed, until=until, start=start)
        if output.handover is None:
            raise BenchmarkError("handoff", "this process made no hand-over")
        return output.handover

    def there(self, seed: int, until: int, start: Handover | None) -> Handover:
        """The same steps on the server."""
        exchange = self.exchange(seed, until, start)
        return self.cloud.run(exchange.asked, exchange.tensors, self.plan)[0]

    def exchange(self, seed: int, until: int, start: Handover | None) -> Exchange:
        """What the server is asked."""
        steps = [list(pair) for pair in self.asked["steps"]]
        asked = {**self.asked, "steps": steps, "seed": seed, "until": until}
        if start is None:
            return Exchange(asked, {}, self.plan)
        return Exchange({**asked, "start_step": start.step}, {"state": start.state}, self.plan)


def case_figures(sides: Sides, case: str, rounds: int, warm_up: int, port: int) -> dict[str, Any]:
    """What the steps take here and there, and the parts of the latter, in milliseconds.

    Raises:
        BenchmarkError: the server's state is another one.
        CloudError: the server failed.
    """
    taken: dict[str, list[float]] = {"here": [], "there": []}
    parts: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for round_ in range(warm_up + rounds):
        start = None if case == CASES[0] else sides.here(round_, 1, None)
        until = 1 if start is None else 2
        states: dict[str, Handover] = {}
        for name, run in rotated((("here", sides.here), ("there", sides.there)), round_):
            began = time.perf_counter()
            states[name] = run(round_, until, start)
            if round_ >= warm_up:
                taken[name].append((time.perf_counter() - began) * 1e3)
        if not np.array_equal(states["here"].state, states["there"].state):
            raise BenchmarkError("handoff", "the server's state is another one than this process's")
        exchange = sides.exchange(round_, until, start)
        seen, sizes = exchanged(port, exchange)
        seen |= own_parts(sides.pipe, exchange, states["here"])
        if round_ >= warm_up:
            for part, milliseconds in seen.items():
                parts.setdefault(part, []).append(milliseconds)
    cost, state = spread(np.subtract(taken["there"], taken["here"]).tolist()), states["here"].state.shape
    return {
        "case": case,
        **sizes,
        "state": list(state),
        "goal_met": cost["median"] < GOALS["cost_ms"] if state[1:] == GOAL_LATENT else None,
        "here_ms": spread(taken["here"]),
        "there_ms": spread(taken["there"]),
        "cost_ms": cost,
        "cost_by_server_ms": spread(parts.pop("beyond")),
        "parts_ms": {part: spread(samples) for part, samples in parts.items()},
    }


def markdown(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown: medians with the 10th to 90th percentile."""
    cases = facts["cases"]
    heads = ("hand-over, ms", "one process", "the server", "cost", "cost by its clock", "bytes sent", "received")
    rows = [
        [
            f"{one['case']}, state {'x'.join(map(str, one['state']))}",
            *(cell(one[name], 2) for name in ("here_ms", "there_ms", "cost_ms", "cost_by_server_ms")),
            *(f"{one[name]:,}" for name in ("sent_bytes", "received_bytes")),
        ]
        for one in cases
    ]
    part_heads = ("part of it, ms", *(one["case"] for one in cases))
    names = dict.fromkeys(name for one in cases for name in one["parts_ms"])
    parts = [
        [PARTS.get(name, name), *(cell(one["parts_ms"][name], 2) if name in one["parts_ms"] else "" for one in cases)]
        for name in names
    ]
    threads = "as many threads as the backend likes" if facts["threads"] is None else f"{facts['threads']} threads"
    told = (
        f"{facts['bundle']}'s {facts['denoiser']} on {facts['target']}, {threads} in each process, {facts['repeats']} "
        "rounds in turns; medians, in brackets the 10th to 90th percentile. Both sides' states are the same bits. By "
        "the server's clock the cost is all that one more exchange takes, on a connection of its own, packed and "
        "unpacked, without what the server says that its pipeline took; parts are of that exchange, and of the same "
        "calls in this process. The others' connection is kept. "
    )
    tables = (markdown_table(heads, rows), goal_line(cases), markdown_table(part_heads, parts))
    return "\n".join((*tables, f"{told}{described(facts['machine'])}\n", half_markdown(facts["half"])))


def goal_line(cases: Sequence[Mapping[str, Any]]) -> str:
    """Whether the cost is what it is to be."""
    goal = f"a cost below {GOALS['cost_ms']:g} ms at the median, for a latent of {'x'.join(map(str, GOAL_LATENT))}"
    told = {True: "met by", False: "missed by", None: "not set for"}
    outcomes = [f"{told[one['goal_met']]} {one['case']} ({one['cost_ms']['median']:.2f})" for one in cases]
    return f"The goal, {goal}: {', '.join(outcomes)}.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write FILE and a Markdown table beside it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_report(parser)
    parser.add_argument("--target", default="onnxruntime:cpu", metavar="TARGET", help="default: onnxruntime:cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a model; the backend's choice by default")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="a picture's side in pixels (default 512)")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="handed over in float16 too (default 8)")
    add_rounds(parser, 10, 200)
    given = parser.parse_args(arguments)
    if given.pictures < 1:
        raise ArgumentError("--pictures", "not usable", got=given.pictures, expected="a whole number, 1 or more")
    facts: dict[str, Any] = {"machine": machine_facts(), "goals": GOALS, "target": given.target}
    facts |= {"threads": given.threads, "repeats": given.repeats, "warm_up": given.warm_up}
    with (
        served(given.bundle, given.target, given.threads) as server,
        Pipeline.open(given.bundle, given.target, threads=given.threads) as pipe,
        closing(Cloud(server.url)) as cloud,
    ):
        manifest = pipe.bundle.manifest
        denoiser = min(manifest.names("denoiser"), key=lambda name: manifest.components[name].parameters)
        asked: dict[str, Any] = {"prompt": PROMPT, "steps": ((denoiser, 2),), "guidance_scale": 1.0}
        plan = compile_plan(manifest, Schedule(steps=asked["steps"], guidance_scale=asked["guidance_scale"]))
        asked |= {"height": given.size, "width": given.size}
        sides = Sides(pipe, cloud, asked, plan.digest)
        facts |= {"bundle": pipe.bundle.path.name, "denoiser": denoiser}
        facts["cases"] = [case_figures(sides, case, given.repeats, given.warm_up, server.port) for case in CASES]
        facts["half"] = half_figures(pipe, server.url, PROMPT, given.size, given.pictures)
    write_report(given.json, facts, markdown(facts))


if __name__ == "__main__":
    run_program(main)
