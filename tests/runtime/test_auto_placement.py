"""The placement that is fastest: tried once, remembered in the cache by all that it rests on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import CancelledError, Pipeline
from tandemrt.runtime.auto_placement import AutoPlacement
from tandemrt.runtime.cache import cache_folder
from tandemrt.runtime.placement import Branches
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.targets import parse_target

from .test_sampler import SHAPE, plan
from .tiny_bundle import write_tiny_bundle

EVERY = ["batched", "parallel", "sequential"]


class Timed:
    """Predicts nothing, in a time that is given; counts its rows."""

    def __init__(self, placement: str, ms: float, rows: list[str]) -> None:
        self._placement, self._ms, self._rows = placement, ms, rows

    def predict(self, row: int, sample: np.ndarray, *, guided: bool) -> Branches:
        assert guided
        self._rows.append(self._placement)
        return Branches(sample, sample, self._ms, (), self._placement)

    def rest(self) -> None: ...


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    write_tiny_bundle(tmp_path / "bundle")
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    return lambda **more: Pipeline.open(tmp_path / "bundle", **more)


Open = Callable[..., Pipeline]


def chosen(pipe: Pipeline, ms: dict[str, float], compiled: Plan | None = None, **more: Any) -> tuple[str, list[str]]:
    """The choice of a newly opened pipeline where rows take these times, and the rows that were tried."""
    rows: list[str] = []
    target = parse_target(more.get("target", "onnxruntime:cpu"))
    auto = AutoPlacement(pipe.bundle, target, more.get("threads", 2), cache_folder())
    placement = auto.choose(
        compiled or plan(4),
        more.get("shape", SHAPE),
        more.get("controls", ()),
        lambda one: Timed(one, ms[one], rows),
        more.get("before", lambda: None),
    )
    return placement, rows


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        ({"batched": 10.0, "parallel": 7.0, "sequential": 11.0}, "parallel"),
        ({"batched": 10.0, "parallel": 12.0, "sequential": 9.0}, "sequential"),
        ({"batched": 10.0, "parallel": 9.8, "sequential": 9.9}, "batched"),
    ],
)
def test_the_fastest_is_chosen_unless_it_gains_nothing(pipeline: Open, ms: dict[str, float], expected: str) -> None:
    with pipeline() as pipe:
        assert chosen(pipe, ms)[0] == expected


def test_a_choice_is_remembered_by_all_that_it_rests_on(pipeline: Open, tmp_path: Path) -> None:
    slow, fast = (
        {"batched": 9.0, "parallel": 5.0, "sequential": 9.0},
        {"batched": 1.0, "parallel": 5.0, "sequential": 9.0},
    )
    with pipeline() as pipe:
        placement, rows = chosen(pipe, slow)
        assert (placement, sorted(set(rows))) == ("parallel", EVERY)
        assert chosen(pipe, fast) == ("parallel", [])
        others: list[dict[str, Any]] = [
            {"shape": (1, 4, 8, 8)}, {"threads": 3}, {"controls": ("controlnet_canny",)}, {"target": "openvino:cpu"},
            {"compiled": plan({"unet": 2, "unet_small": 2})},
        ]  # fmt: skip
        for other in others:
            assert chosen(pipe, fast, **other)[0] == "batched"
    files = list((tmp_path / "cache" / "placements").iterdir())
    assert len(files) == 1 + len(others)
    stated = json.loads(files[0].read_bytes())
    assert stated["ground"]["bundle"] == pipe.bundle.digest
    assert set(stated["ms"]) == set(EVERY)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"ground": 3}', b"[" * 100_000])
def test_what_is_damaged_is_measured_anew(pipeline: Open, tmp_path: Path, damage: bytes) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    with pipeline() as pipe:
        chosen(pipe, ms)
        (file,) = (tmp_path / "cache" / "placements").iterdir()
        whole = file.read_bytes()
        file.write_bytes(damage or whole.replace(b'"parallel"', b'"elsewhere"'))
        assert chosen(pipe, ms)[1]
    assert file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]


def test_one_thread_and_unguided_plans_have_less_to_choose_from(pipeline: Open) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 3.0}
    with pipeline() as pipe:
        placement, rows = chosen(pipe, ms, threads=1)
        assert (placement, sorted(set(rows))) == ("sequential", ["batched", "sequential"])
        assert chosen(pipe, ms, plan(4, guidance_scale=1.0)) == ("batched", [])


def test_a_cancelled_trial_is_not_remembered(pipeline: Open, tmp_path: Path) -> None:
    def cancel() -> None:
        raise CancelledError("generation", "cancelled")

    with pipeline() as pipe, pytest.raises(CancelledError):
        chosen(pipe, dict.fromkeys(EVERY, 1.0), before=cancel)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_pictures_are_those_of_batched(pipeline: Open, tmp_path: Path, target: str) -> None:
    arguments: dict[str, Any] = {"prompt": "red", "seed": 7, "num_inference_steps": 3, "output_type": "np"}
    images = []
    for _ in range(2):
        with pipeline(target=target, threads=2) as pipe:
            out = pipe(**arguments, placement="auto")
            images.append(out.images[0])
            assert out.plan.placement in EVERY
            assert {row.placement for row in out.plan.ran} == {out.plan.placement}
            expected = pipe(**arguments).images[0]
    np.testing.assert_allclose(images[0], expected, atol=1e-4)
    np.testing.assert_array_equal(images[0], images[1])
    assert len(list((tmp_path / "cache" / "placements").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_another_measurement(pipeline: Open, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    with pipeline() as pipe:
        assert [bool(chosen(pipe, ms)[1]) for _ in range(2)] == [True, True]
