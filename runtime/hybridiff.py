"""Hybridiff's placement: branches in parallel and, within a window, the denoiser's stages all at once.

Within the window each stage works on what the stages before it made a step ago, the first ones under the unconditional
text, the others under the conditional one, and what comes out serves both branches; see `stage_work`.

Source: kaist-dmlab/Hybridiff, `hybridiff/hybrid_sd.py` and its pipelines (CVPR 2026).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from .backends.base import Binding, Lying, Shape
from .discrepancy import Discrepancy
from .placement import Branches, Crew, Placed, Sample
from .plan import Plan
from .stage_parts import Part, Parts
from .stage_work import StageWork, window_work
from .window import Window

_WINDOW = "in the window: one prediction serves both branches"


class Hybridiff:
    """A plan's rows in and out of the window; see `Placed`. One generation's.

    outside: predicts rows that run both branches whole. parts: of all stages.
    """

    def __init__(self, plan: Plan, window: Window, outside: Placed, parts: Parts) -> None:
        self._plan, self._window, self._outside, self._parts = plan, window, outside, parts
        self._discrepancy = Discrepancy(window.taus, plan.table.rows)
        self._work: dict[int, StageWork] = {}
        self._crew = Crew(window.pipelining.workers)

    def bind(self, calls: Iterable[tuple[int, bool]], shape: Shape) -> None:
        """See `Placed`; the stages are bound already."""
        self._outside.bind(calls, shape)

    def predict(self, row: int, sample: Sample, *, guided: bool) -> Branches:
        """See `Placed`."""
        phase = self._discrepancy.phase(row)
        if phase == "branches":
            made = self._outside.predict(row, sample, guided=guided)
            return replace(made, seen=partial(self._discrepancy.record, row))
        if phase == "fill":
            last = self._discrepancy.steps[-1]
            self._work = dict(window_work(self._window.pipelining, row, last, self._plan.table.rows))
            return self._filled(row, sample)
        return self._pipelined(self._work[row], sample)

    def rest(self) -> None:
        """See `Placed`."""
        self._outside.rest()
        self._crew.rest()

    def _filled(self, row: int, sample: Sample) -> Branches:
        """Both texts run through the stages at once; each stage hands on what it made under its own."""
        began = time.perf_counter()
        self._crew.run([partial(_run_chain, chain, sample, self._time(row)) for chain in self._parts.chains])
        return self._branches(self._parts.own[-1], began, "filling")

    def _pipelined(self, work: StageWork, sample: Sample) -> Branches:
        """All stages at once, each on what was handed on before."""
        own, again = self._parts.own, self._parts.again if work.again is not None else None
        if work.time_of is None:
            return self._branches(own[-1], time.perf_counter(), "held")
        handed = {name: maker for part in own for name, maker in part.makers.items()}
        for part in own:
            part.give(sample, self._time(work.time_of), handed)
        if again is not None and work.again is not None:
            again.give(sample, self._time(work.again), handed)
        running = own if again is None else [*own, again]
        began = time.perf_counter()
        self._crew.run([part.run for part in running])
        return self._branches(running[-1], began, "pipelined")

    def _branches(self, part: Part, began: float, placement: str) -> Branches:
        model_ms = (time.perf_counter() - began) * 1e3
        name, taus = self._parts.prediction, self._discrepancy.found
        prediction = part.binding.outputs[name]
        lying = (Lying(part.binding, name, prediction.shape),)
        return Branches(prediction, None, model_ms, (), placement, _WINDOW, taus=taus, lying=lying)

    def _time(self, row: int) -> float:
        return float(self._plan.table.timesteps[row])


def _run_chain(chain: Sequence[Part], sample: Sample, timestep: float) -> None:
    """Run stages one after the other, each on what those before it made."""
    handed: dict[str, Binding] = {}
    for part in chain:
        part.give(sample, timestep, handed)
        part.run()
        handed.update(part.makers)
