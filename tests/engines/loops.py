"""One plan walked by the runtime's loop on denoisers and on step engines made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tandemrt.engines.graph_files import read_graph, write_graph
from tandemrt.engines.step import HISTORY, step_graph
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Session
from tandemrt.runtime.backends.tensorrt_binding import TensorRtBinding
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.errors import ExecutionError
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.placement import Batched, Worker
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.rng import new_generator
from tandemrt.runtime.rows import Rows
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.state import State
from tandemrt.runtime.step_sampler import StepEngine, StepSampler
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.tensors import latent_names, spec_of
from tandemrt.runtime.update_sampler import UpdateSampler
from tandemrt.runtime.variant import Variant

TOKENS = 6
Open = Callable[[Path], Session]


def on_onnxruntime(model: Path) -> Session:
    return open_session(model, parse_target("onnxruntime:cpu:fp32"), threads=1)


def on_openvino(model: Path) -> Session:
    return open_session(model, parse_target("openvino:cpu:fp32"), threads=1)


def conditioning(manifest: Manifest, plan: Plan, batch: int = 1) -> dict[str, Conditioning]:
    """Normal noise for every input of the plan's denoisers that belongs to a branch, or follows the latent."""
    random = np.random.default_rng(0)
    made = {}
    for name in dict.fromkeys(plan.denoisers):
        inputs = manifest.components[name].inputs
        latent, sizes = latent_names(inputs).sample, {"batch": batch, "sequence": TOKENS}
        branches = [
            {
                one.name: random.standard_normal([sizes.get(str(size), size) for size in one.shape]).astype(np.float32)
                for one in inputs
                if one.name not in (latent, "timestep") and "residual" not in one.name
            }
            for _ in range(2)
        ]
        made[name] = Conditioning(*branches)
    return made


def engines(folder: Path, bundle: Path, plan: Plan, opened: Open, history: int = HISTORY) -> dict[Any, StepEngine]:
    """The step engines that the plan's rows want, composed into `folder`."""
    made = {}
    for name, guided in dict.fromkeys(zip(plan.denoisers, plan.guided, strict=True)):
        graph = step_graph(read_graph(bundle / name / "model.onnx"), guided=guided, history=history, where=name)
        session = opened(write_graph(graph, folder / f"{name}_{guided}", bundle / name))
        made[name, guided] = StepEngine(session, Variant(step="guided" if guided else "unguided"))
    return made


class Walk:
    """The same latents and noise for whoever walks the plan."""

    def __init__(self, plan: Plan, given: Mapping[str, Conditioning], shape: Sequence[int]) -> None:
        self.plan, self._given = plan, given
        self._generator, self._shape = new_generator(3), tuple(shape)
        self._begun = self._noise() * np.float32(plan.table.init_noise_sigma)

    def _noise(self) -> npt.NDArray[np.float32]:
        return self._generator.randn(self._shape)

    def _fill(self, noise: npt.NDArray[np.float32]) -> None:
        self._generator.fill(noise)

    def unfused(self, denoisers: Mapping[str, Session]) -> Sampler:
        return Sampler(self.plan, Batched(Worker(self.plan, denoisers, self._given)), self._fill)

    def fused(self, steps: Mapping[tuple[str, bool], StepEngine]) -> StepSampler:
        return StepSampler(Rows(self.plan, self._given, self._fill), steps)

    def end(self, *samplers: Sampler | StepSampler) -> tuple[State, list[npt.NDArray[np.float32]]]:
        """The final state and each row's denoised estimate; several samplers share the rows evenly."""
        self._generator = new_generator(7)
        state, estimates = State.begin(self.plan.table, self._begun.copy()), []
        for index, sampler in enumerate(samplers, 1):
            until = self.plan.table.rows * index // len(samplers)
            estimates += [done.denoised() for done in sampler.run(state, until)]
        assert state.row == self.plan.table.rows
        return state, estimates


def denoisers(bundle: Path, plan: Plan) -> dict[str, Session]:
    return {name: on_onnxruntime(bundle / name / "model.onnx") for name in dict.fromkeys(plan.denoisers)}


def latent_shape(manifest: Manifest, plan: Plan, batch: int = 1) -> tuple[int, ...]:
    component = manifest.components[plan.denoisers[0]]
    latent = spec_of(component.inputs, latent_names(component.inputs).sample)
    assert latent is not None
    return batch, manifest.latent.channels, 8, 16


def require_state_stays(
    runner: StepSampler | UpdateSampler, state: State, same: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of engines on stand-in GPUs that makes NaN raises, and leaves its state what it was: `same`, of others."""
    expected, run = same.arrays.copy(), TensorRtBinding.run

    def spoiling(binding: TensorRtBinding) -> None:
        run(binding)
        if "sums" in binding.outputs:
            for name in ("sums", "next_state"):
                binding.outputs[name].fill(np.nan)
            binding.write("next_state")

    monkeypatch.setattr(TensorRtBinding, "run", spoiling)
    before = state.row
    with pytest.raises(ExecutionError, match="NaN or Inf in the latent"):
        next(runner.run(state))
    assert state.row == before
    np.testing.assert_array_equal(state.arrays, expected)
