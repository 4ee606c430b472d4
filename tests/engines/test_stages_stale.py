"""Hybridiff's window on stage graphs: step by step what the same staleness on diffusers' modules makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from tandemrt.engines.graph_files import read_graph, write_graph
from tandemrt.engines.stages import stage_graphs
from tandemrt.runtime.discrepancy import Discrepancy, Taus
from tandemrt.runtime.stage_work import Pipelining, StageWork, window_work
from tandemrt.runtime.stages import Stage

from .small_denoisers import FAMILIES, POOLED_WIDTH, TEXT_WIDTH, module
from .stale_reference import Reference, Units

pytestmark = pytest.mark.slow

STEPS, GUIDANCE_SCALE, TOLERANCE = 10, 3.0, 1e-4
Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]


class Graphs:
    """A denoiser's graph and its stages on ONNX Runtime, driven as the reference is."""

    def __init__(self, model: Path, count: int, folder: Path) -> None:
        graph = read_graph(model)
        made = stage_graphs(graph, count)
        self.stages: list[Stage] = [one.stage for one in made]
        self.whole = onnxruntime.InferenceSession(model)
        self.parts = [
            onnxruntime.InferenceSession(write_graph(one.model, folder / str(one.stage.index), model.parent))
            for one in made
        ]

    def run(self, session: Any, given: Mapping[str, Array]) -> Arrays:
        names = [value.name for value in session.get_outputs()]
        results = session.run(names, {value.name: given[value.name] for value in session.get_inputs()})
        return dict(zip(names, results, strict=True))


class Driver:
    """The schedule of `runtime.discrepancy` and `runtime.stage_work` on graphs."""

    def __init__(self, graphs: Graphs, branches: tuple[Arrays, Arrays], pipelining: Pipelining, taus: Taus) -> None:
        self._graphs, self._branches, self._pipelining = graphs, branches, pipelining
        self.discrepancy = Discrepancy(taus, STEPS)
        self._latent, self._prediction = [value.name for value in (graphs.whole.get_inputs()[0],
                                                                   graphs.whole.get_outputs()[0])]  # fmt: skip
        self._handed: Arrays = {}
        self._held: Array | None = None
        self._work: dict[int, StageWork] = {}

    def steps(self, scheduler: Any, latent: Array) -> Iterator[tuple[Array, Array]]:
        times = scheduler.timesteps.numpy().astype(np.float32)
        for step, timestep in enumerate(scheduler.timesteps):
            phase = self.discrepancy.phase(step)
            if phase == "branches":
                prediction = self._guided(step, latent, times[step])
            elif phase == "fill":
                prediction = self._filled(latent, times[step])
                first, last = step, self.discrepancy.tau2
                assert last is not None
                self._work = dict(window_work(self._pipelining, first, last, STEPS))
            else:
                prediction = self._pipelined(self._work[step], latent, times)
            stepped = scheduler.step(torch.from_numpy(prediction), timestep, torch.from_numpy(latent))
            latent = stepped.prev_sample.numpy()
            yield prediction, latent

    def _given(self, latent: Array, time: float, conditional: bool) -> Arrays:
        timestep = np.full(len(latent), time, np.float32)
        return {self._latent: latent, "timestep": timestep, **self._branches[int(conditional)]}

    def _guided(self, step: int, latent: Array, time: float) -> Array:
        without, given = (self._graphs.run(self._graphs.whole, self._given(latent, time, branch))[self._prediction]
                          for branch in (False, True))  # fmt: skip
        self.discrepancy.record(step, self.discrepancy.measured(given, without))
        return without + np.float32(GUIDANCE_SCALE) * (given - without)

    def _filled(self, latent: Array, time: float) -> Array:
        """Both texts run through all stages; each stage hands on what it made under its own."""
        for conditional in (False, True):
            values = self._given(latent, time, conditional)
            for index, part in enumerate(self._graphs.parts):
                made = self._graphs.run(part, values)
                values |= made
                if self._pipelining.conditional(index) == conditional:
                    self._handed |= made
        return values[self._prediction]

    def _pipelined(self, work: StageWork, latent: Array, times: Array) -> Array:
        if work.prediction == "held":
            assert self._held is not None
            return self._held
        made: Arrays = {}
        again: Array | None = None
        for index, part in enumerate(self._graphs.parts):
            conditional = self._pipelining.conditional(index)
            made |= self._graphs.run(part, {**self._given(latent, times[work.time_of], conditional), **self._handed})
        if work.again is not None:
            last = {**self._given(latent, times[work.again], conditional=True), **self._handed}
            again = self._graphs.run(self._graphs.parts[-1], last)[self._prediction]
        self._handed |= made
        self._held = made[self._prediction]
        return self._held if again is None else again


def texts(family: str) -> tuple[Arrays, Arrays]:
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
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize(
    ("stages", "stride", "time_shift"), [(2, 1, False), (2, 1, True), (2, 2, False), (2, 2, True), (4, 1, False),
                                         (4, 1, True), (4, 2, False)]
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_on_stale_activations_are_the_reference(
    exported: Callable[[str], Path], tmp_path: Path, family: str, stages: int, stride: int, time_shift: bool
) -> None:
    taus = Taus(l_slope=2, eps_slope=0.05, k=5, tau_cap=3)
    pipelining, branches = Pipelining(stages, stride, time_shift), texts(family)
    graphs = Graphs(exported(family), stages, tmp_path)
    driver = Driver(graphs, branches, pipelining, taus)
    latent = np.random.default_rng(9).standard_normal((1, 16 if family == "sd3" else 4, 16, 8)).astype(np.float32)
    given = tuple({name: torch.from_numpy(array) for name, array in branch.items()} for branch in branches)
    cuts = [stage.begins for stage in graphs.stages[1:]]
    with torch.no_grad():
        units = Units(module(family), torch.from_numpy(latent), given[0], cuts)
    reference = Reference(units, (given[0], given[1]), pipelining, taus, GUIDANCE_SCALE)
    ran = driver.steps(scheduler_of(family), latent)
    expected = reference.steps(scheduler_of(family), torch.from_numpy(latent))
    phases, stale = [], 0.0
    for step, ((prediction, reached), (wanted, wanted_latent)) in enumerate(zip(ran, expected, strict=True)):
        phases.append(driver.discrepancy.phase(step))
        assert np.abs(prediction - wanted.numpy()).max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
        assert np.abs(reached - wanted_latent.numpy()).max() <= TOLERANCE * max(1.0, float(wanted_latent.abs().max()))
        if phases[-1] == "pipelined":
            stale = max(stale, np.abs(prediction - fresh(driver, graphs, latent, step, family, branches[1])).max())
        latent = reached
    assert phases.count("fill") == 1
    assert phases.count("pipelined") >= 4
    assert phases[0] == phases[-1] == "branches"
    assert (driver.discrepancy.tau1, driver.discrepancy.first) == (reference.tau1, reference.first)
    log = driver.discrepancy.log
    np.testing.assert_allclose(log[~np.isnan(log)], reference.log, rtol=1e-4)
    assert stale > 10 * TOLERANCE


def fresh(driver: Driver, graphs: Graphs, latent: Array, step: int, family: str, branch: Arrays) -> Array:
    """What the whole denoiser makes of the step, nothing stale."""
    time = scheduler_of(family).timesteps.numpy().astype(np.float32)[step]
    name = "hidden_states" if family == "sd3" else "sample"
    given = {name: latent, "timestep": np.full(len(latent), time, np.float32), **branch}
    return next(iter(graphs.run(graphs.whole, given).values()))
