"""All rows of a plan launched as one, on a stand-in for a backend that can; what generations leave for the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tandemrt.runtime import ExecutionError, Output, Pipeline
from tandemrt.runtime.backends.onnxruntime import OnnxRuntimeBinding
from tandemrt.runtime.solvers import SOLVERS

from ..runtime.tiny_bundle import write_tiny_bundle
from .test_sampling import build

HYBRID = {"steps": {"unet": 2, "unet_small": 3}}


class Runs:
    """What ONNX Runtime does one after another in place of a CUDA graph; `launched` are the rows of each launch."""

    launched: ClassVar[list[int]]

    def __init__(self, runs: Sequence[tuple[OnnxRuntimeBinding, Collection[str]]], carried: Mapping[str, str]) -> None:
        self._bindings, self._carried = [binding for binding, _ in runs], carried
        self.rows = [{name: np.zeros_like(binding.inputs[name]) for name in given} for binding, given in runs]

    def run(self) -> None:
        self.launched.append(len(self.rows))
        before = None
        for binding, row in zip(self._bindings, self.rows, strict=True):
            for name, values in row.items():
                binding.inputs[name][...] = values
            for name, output in self._carried.items() if before is not None else ():
                binding.inputs[name][...] = before.outputs[output]
            binding.run()
            before = binding


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> type[Runs]:
    """ONNX Runtime as a backend that launches many runs as one."""

    class Own(Runs):
        launched: ClassVar[list[int]] = []
        made: ClassVar[list[Any]] = []

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.made.append(self)

    monkeypatch.setattr(OnnxRuntimeBinding, "chain", lambda _, runs, carried: Own(runs, carried), raising=False)
    return Own


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("unets")
    write_tiny_bundle(folder / "bundle")
    build(folder / "bundle", folder / "cache", "unet", "unet_small")
    return folder / "bundle", folder / "cache"


@pytest.fixture
def pipe(unets: tuple[Path, Path]) -> Any:
    with Pipeline.open(unets[0], "onnxruntime:cpu", threads=1, cache=unets[1]) as pipe:
        yield pipe


def painted(paint: Callable[..., Any], **arguments: Any) -> Output:
    given = {"prompt": "red blue", "seed": 7, "output_type": "np", **HYBRID, **arguments}
    made = paint(**given)
    return made if isinstance(made, Output) else made.result()


def require_same(one: Output, other: Output) -> None:
    np.testing.assert_array_equal(one.latents, other.latents)
    assert one.plan.ran == other.plan.ran
    assert other.latents.std() > 0.1


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"flow_euler"}))
def test_all_rows_as_one_paint_what_they_paint_apart(pipe: Any, runs: Any, solver: str) -> None:
    eta = 0.3 if solver in ("ddim", "tcd") else None
    together = painted(pipe, solver=solver, eta=eta)
    rows = len(together.timings.rows)
    assert runs.launched == [rows]
    assert {row.together for row in together.timings.rows} == {rows}
    assert [row.denoiser for row in together.timings.rows] == list(together.plan.denoisers)
    apart = painted(pipe.stream, solver=solver, eta=eta)
    assert {row.together for row in apart.timings.rows} == {1}
    require_same(together, apart)
    assert len(runs.launched) == 1


def test_guidance_that_ends_goes_from_engine_to_engine_in_the_same_launch(pipe: Any, runs: Any) -> None:
    together = painted(pipe, guidance_interval=(0.0, 0.5))
    assert runs.launched == [5]
    require_same(together, painted(pipe.stream, guidance_interval=(0.0, 0.5)))


def test_what_was_made_for_one_request_serves_the_next(pipe: Any, runs: Any) -> None:
    """Of the same shapes and plan, also with other text, seed and schedule; another batch is made anew."""
    first = painted(pipe)
    require_same(painted(pipe), first)
    other = painted(pipe, prompt="green", seed=8, solver="euler_a")
    assert len(runs.made) == 2  # rows that draw noise are given more
    painted(pipe, prompt=["red", "blue"], seed=[1, 2])
    assert len(runs.made) == 3
    require_same(painted(pipe.stream, prompt="green", seed=8, solver="euler_a"), other)
    require_same(painted(pipe), first)
    assert len(runs.made) == 3


@pytest.mark.parametrize("arguments", [{"previews": 2}, {"steps": 1}], ids=["previews", "one row"])
def test_rows_that_are_looked_at_run_apart(pipe: Any, runs: Any, arguments: dict[str, Any]) -> None:
    assert {row.together for row in painted(pipe, **arguments).timings.rows} == {1}
    assert runs.launched == []


def test_map_launches_rows_as_one(pipe: Any, runs: Any) -> None:
    given = {"prompt": "red blue", "output_type": "np", **HYBRID}
    made = list(pipe.map({**given, "seed": seed} for seed in (7, 8, 7)))
    assert runs.launched == [5, 5, 5]
    require_same(made[2], made[0])
    require_same(made[0], painted(pipe.stream))


def test_rows_as_one_that_overflow_are_run_apart_to_name_the_row(pipe: Any, runs: Any) -> None:
    with pytest.raises(ExecutionError, match=r"step 0 \(timestep 999, unet\): NaN or Inf in the latent") as together:
        painted(pipe, guidance_scale=3e38, solver="euler_a")
    assert runs.launched == [5]
    with pytest.raises(ExecutionError) as apart:
        painted(pipe.stream, guidance_scale=3e38, solver="euler_a")
    assert str(together.value) == str(apart.value)
    painted(pipe)  # the pipeline is as before
