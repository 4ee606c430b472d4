"""Hybridiff's window in the sampler: row by row what the same staleness on diffusers' modules makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from tandemrt.engines.graph_files import read_graph, write_graph
from tandemrt.engines.stages import StageGraph, stage_graphs
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Session, Shape
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.discrepancy import Taus
from tandemrt.runtime.hybridiff import Hybridiff
from tandemrt.runtime.placement import Branches, Parallel, Worker
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.solvers import compile_table
from tandemrt.runtime.stage_parts import Stages, bound_parts
from tandemrt.runtime.stage_work import Pipelining
from tandemrt.runtime.state import State
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.window import Window

from .small_denoisers import FAMILIES, POOLED_WIDTH, TEXT_WIDTH, module
from .stale_reference import Reference, Units

pytestmark = pytest.mark.slow

ROWS, GUIDANCE_SCALE, TOLERANCE = 10, 3.0, 1e-4
TAUS = Taus(l_slope=2, eps_slope=0.05, k=5, tau_cap=3)
Array = npt.NDArray[np.float32]
Texts = Mapping[str, Array]


def texts(family: str) -> tuple[Texts, Texts]:
    """The unconditional branch's and the conditional one's."""
    random = np.random.default_rng(8)
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (1, 7, TEXT_WIDTH)}
    if family == "sdxl":
        shapes |= {"text_embeds": (1, POOLED_WIDTH), "time_ids": (1, 6)}
    if family == "sd3":
        shapes |= {"pooled_projections": (1, POOLED_WIDTH)}
    made = [{name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in "uc"]
    return made[0], made[1]


def scheduler_of(family: str) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if family == "sd3" else DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(ROWS)
    return scheduler


class Watched:
    """Rows of a window; `stale` is how far one in it was from what the whole denoiser makes, nothing stale."""

    def __init__(self, placed: Hybridiff, whole: Parallel) -> None:
        self._placed, self._whole, self.stale = placed, whole, 0.0

    def bind(self, calls: Iterable[tuple[int, bool]], shape: Shape) -> None:
        self._placed.bind(calls, shape)

    def predict(self, row: int, sample: Array, *, guided: bool) -> Branches:
        made = self._placed.predict(row, sample, guided=guided)
        if made.placement == "pipelined":
            fresh = self._whole.predict(row, sample, guided=False).conditional
            self.stale = max(self.stale, float(np.abs(made.conditional - fresh).max()))
        return made

    def rest(self) -> None:
        self._placed.rest()


def opened(made: list[StageGraph], weights: Path, folder: Path) -> list[Session]:
    target = parse_target("onnxruntime:cpu")
    graphs = [write_graph(one.model, folder / str(one.stage.index), weights) for one in made]
    return [open_session(graph, target, threads=1) for graph in graphs]


def reading_behind_the_latent(denoiser: Any, channels: Array) -> Any:
    """A denoiser that is given latents alone and reads these channels, (B, …, h, w), behind them."""
    forward, behind = denoiser.forward, torch.from_numpy(channels)
    denoiser.forward = lambda latent, *args, **kwargs: forward(torch.cat([latent, behind], dim=1), *args, **kwargs)
    return denoiser


PIPELININGS = ((2, 1, False), (2, 1, True), (2, 2, False), (2, 2, True), (4, 1, False), (4, 1, True), (4, 2, False))
CASES = [(family, *one) for family in FAMILIES for one in PIPELININGS]
CASES += [("inpainting", 2, 1, False), ("inpainting", 4, 2, True)]


@pytest.mark.parametrize(("family", "stages", "stride", "time_shift"), CASES)
def test_the_sampler_reaches_the_references_latents(
    exported: Callable[[str], Path], tmp_path: Path, family: str, stages: int, stride: int, time_shift: bool
) -> None:
    window, branches, scheduler = (
        Window(TAUS, Pipelining(stages, stride, time_shift)),
        texts(family),
        scheduler_of(family),
    )
    table = compile_table(type(scheduler).__name__, dict(scheduler.config), ROWS)
    names, guided = ("unet",) * ROWS, (True,) * ROWS
    plan = Plan(table, names, guided, GUIDANCE_SCALE, placement="hybridiff", window=window)
    model = exported(family)
    whole, made = (
        open_session(model, parse_target("onnxruntime:cpu"), threads=1),
        stage_graphs(read_graph(model), stages),
    )
    behind = np.random.default_rng(10).standard_normal((1, 5, 16, 8)).astype(np.float32)
    channels = behind if family == "inpainting" else None
    conditioning = {"unet": Conditioning(branches[1], branches[0], channels)}
    worker = Worker(plan, {"unet": whole}, conditioning)
    parallel = Parallel(worker, worker)
    parts = Stages("unet", whole.inputs, opened(made, model.parent, tmp_path))
    latent = np.random.default_rng(9).standard_normal((1, 16 if family == "sd3" else 4, 16, 8)).astype(np.float32)
    bound = bound_parts(parts, window.pipelining, conditioning["unet"], latent.shape, lambda: None)
    placed = Watched(Hybridiff(plan, window, parallel, bound), parallel)
    given = [{name: torch.from_numpy(array) for name, array in branch.items()} for branch in branches]
    with torch.no_grad():
        denoiser = module(family) if channels is None else reading_behind_the_latent(module(family), channels)
        units = Units(denoiser, torch.from_numpy(latent), given[0], [one.stage.begins for one in made[1:]])
    reference = Reference(units, (given[0], given[1]), window.pipelining, TAUS, GUIDANCE_SCALE)
    sampler = Sampler(plan, placed, lambda _: None)
    state, rows = State.begin(plan.table, latent), []
    expected = reference.steps(scheduler, torch.from_numpy(latent))
    for row, (_, wanted) in zip(sampler.run(state), expected, strict=True):
        assert np.abs(state.latents - wanted.numpy()).max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
        rows.append(row.guidance)
    assert [row.discrepancy for row in rows if row.guided] == pytest.approx(reference.log, rel=1e-4)
    assert plan.having_run(rows).taus == (reference.tau1, (reference.tau1 or 0) + TAUS.k)
    placements = [row.placement for row in rows]
    assert placements.count("filling") == 1
    assert placements.count("pipelined") + placements.count("held") >= 4
    assert ("held" in placements) == (stride == 2)
    assert placements[0] == placements[-1] == "parallel"
    assert [row.guided for row in rows] == [placement == "parallel" for placement in placements]
    assert placed.stale > 10 * TOLERANCE
