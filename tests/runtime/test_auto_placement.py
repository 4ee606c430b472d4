"""The placement that is fastest: tried once, remembered in the cache by all that it rests on."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import CancelledError, EngineError, ExecutionError, Pipeline, auto_placement, sampling
from tandemrt.runtime.auto_placement import AutoPlacement
from tandemrt.runtime.cache import cache_folder
from tandemrt.runtime.placement import Branches
from tandemrt.runtime.plan import Plan
from tandemrt.runtime.targets import parse_target

from .test_sampler import SHAPE, plan
from .tiny_bundle import write_tiny_bundle
from .tiny_families import write_tiny_control

EVERY = ["batched", "parallel", "sequential"]


class Timed:
    """Predicts nothing, in a time that is given, or fails; counts its rows, after which it is to rest."""

    def __init__(self, placement: str, ms: float | Exception, rows: list[str], tired: set[str]) -> None:
        self._placement, self._ms, self._rows, self._tired = placement, ms, rows, tired

    def predict(self, row: int, sample: np.ndarray, *, guided: bool) -> Branches:
        assert guided
        self._rows.append(self._placement)
        self._tired.add(self._placement)
        if isinstance(self._ms, Exception):
            raise self._ms
        return Branches(sample, sample, self._ms, (), self._placement)

    def rest(self) -> None:
        self._tired.discard(self._placement)


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    write_tiny_bundle(tmp_path / "bundle")
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    return lambda **more: Pipeline.open(tmp_path / "bundle", **more)


Open = Callable[..., Pipeline]


def chosen(
    pipe: Pipeline, ms: Mapping[str, float | Exception], compiled: Plan | None = None, **more: Any
) -> tuple[str, list[str]]:
    """The choice of a newly opened pipeline where rows take these times, and the rows that were tried."""
    return asked(opened(pipe, **more), ms, compiled, **more)


def opened(pipe: Pipeline, **more: Any) -> AutoPlacement:
    target = parse_target(more.get("target", "onnxruntime:cpu"))
    return AutoPlacement(pipe.bundle, target, more.get("threads", 2), cache_folder(), more.get("alone", lambda: 0))


def asked(
    auto: AutoPlacement, ms: Mapping[str, float | Exception], compiled: Plan | None = None, **more: Any
) -> tuple[str, list[str]]:
    rows, tired = list[str](), set[str]()

    def place(one: str) -> Timed:
        if one in more.get("unplaced", {}):
            raise more["unplaced"][one]
        return Timed(one, ms[one], rows, tired)

    try:
        measured = auto.choose(
            compiled or plan(4),
            more.get("shape", SHAPE),
            more.get("models", {"unet": ()}),
            place,
            more.get("before", lambda: None),
            more.get("without", {}),
        )
    finally:
        assert not tired
    return "batched" if measured is None else measured.fastest, rows


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


ENGINE, CALL = EngineError("unet", "no engine fits"), ExecutionError("unet", "cudaMalloc failed")


@pytest.mark.parametrize("error", [ENGINE, CALL], ids=["engine", "call"])
@pytest.mark.parametrize("when", ["placed", "run"])
def test_a_placement_that_fails_is_left_out_and_the_choice_not_kept(
    pipeline: Open, tmp_path: Path, when: str, error: Exception
) -> None:
    ms: dict[str, float | Exception] = {"batched": 9.0, "parallel": 5.0, "sequential": 8.0}
    failing = {"unplaced": {"parallel": error}} if when == "placed" else {}
    with pipeline() as pipe:
        auto = opened(pipe)
        placement, rows = asked(auto, ms if failing else {**ms, "parallel": error}, **failing)
        assert (placement, rows.count("sequential"), rows.count("parallel")) == ("sequential", 4, when == "run")
        assert asked(auto, ms) == ("sequential", [])
        assert not (tmp_path / "cache").exists()
        assert chosen(pipe, ms)[0] == "parallel"


@pytest.mark.parametrize("when", ["placed", "run"])
def test_where_all_placements_fail_it_is_told_why_the_first_did(pipeline: Open, when: str) -> None:
    errors: dict[str, Exception] = {"batched": ENGINE, "parallel": CALL, "sequential": CALL}
    with pipeline() as pipe, pytest.raises(EngineError, match="unet: no engine fits"):
        chosen(pipe, errors, unplaced=errors if when == "placed" else {})


@pytest.mark.parametrize("when", ["placed", "run"])
def test_what_ends_the_generation_ends_the_trial(pipeline: Open, when: str) -> None:
    """A cancelled one, and a closed pipeline, of which the model at hand tells in its own words."""
    closed: Any = {"batched": CALL, "parallel": 5.0, "sequential": 8.0}
    cancelled: Any = {**closed, "batched": CancelledError("generation", "cancelled")}
    ended = iter([False] if when == "run" else [])

    def require_open() -> None:
        if next(ended, True):
            raise ExecutionError("pipeline", "used after it was closed")

    with pipeline() as pipe:
        for ms, before in ((cancelled, lambda: None), (closed, require_open)):
            unplaced = {"batched": ms["batched"]} if when == "placed" else {}
            with pytest.raises(ExecutionError, match=r"cancelled|used after it was closed"):
                chosen(pipe, ms, unplaced=unplaced, before=before)


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
            {"shape": (1, 4, 8, 8)}, {"threads": 3}, {"target": "openvino:cpu"},
            {"models": {"unet": (), "controlnet_canny": ()}}, {"models": {"unet_small": ()}},
            {"models": {"unet": ("an engine",)}}, {"models": {"unet": ("another",)}},
        ]  # fmt: skip
        for other in others:
            assert chosen(pipe, fast, **other)[0] == "batched"
    files = list((tmp_path / "cache" / "placements").iterdir())
    assert len(files) == 1 + len(others)
    stated = json.loads(files[0].read_bytes())
    assert stated["ground"]["bundle"] == pipe.bundle.manifest.files_digest
    assert set(stated["ms"]) == set(EVERY)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"usable_cpus": lambda: 64},
        {"cpu_architecture": lambda: "another"},
        {"nvidia_gpus": lambda: ("a GPU",)},
        {"version": lambda _: "9.9"},
        {"installed_version": lambda _: "9.9"},
        {"gpu_names": lambda _: ("0: a GPU",)},
    ],
    ids=lambda elsewhere: next(iter(elsewhere)),
)
def test_another_machine_or_version_is_measured_anew(
    pipeline: Open, monkeypatch: pytest.MonkeyPatch, elsewhere: Mapping[str, Any]
) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    with pipeline() as pipe:
        assert [bool(chosen(pipe, ms)[1]) for _ in range(2)] == [True, False]
        for name, here in elsewhere.items():
            monkeypatch.setattr(auto_placement, name, here)
        assert [bool(chosen(pipe, ms)[1]) for _ in range(2)] == [True, False]


def test_another_bundle_is_measured_anew(pipeline: Open, tmp_path: Path) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    shutil.copytree(tmp_path / "bundle", tmp_path / "copy")
    write_tiny_control(tmp_path / "other")
    with pipeline() as pipe:
        assert chosen(pipe, ms)[1]
    for folder, anew in (("copy", False), ("other", True)):
        with Pipeline.open(tmp_path / folder) as pipe:
            assert bool(chosen(pipe, ms)[1]) == anew


@pytest.mark.parametrize("marks", [[None, None], [1, 2], [1, None], [None, 1]])
def test_what_is_measured_beside_others_holds_for_the_pipeline_alone(
    pipeline: Open, tmp_path: Path, marks: list[int | None]
) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    told = iter(marks)
    with pipeline() as pipe:
        auto = opened(pipe, alone=lambda: next(told))
        assert asked(auto, ms)[1]
        assert asked(auto, ms) == ("parallel", [])
        assert not (tmp_path / "cache").exists()
        assert chosen(pipe, ms)[1]


@pytest.mark.parametrize(("beside", "kept"), [("call", 0), ("put aside", 1), ("done", 1)])
def test_generations_beside_the_trial_are_noticed(
    pipeline: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str, kept: int
) -> None:
    arguments: dict[str, Any] = {"prompt": "red", "num_inference_steps": 2, "output_type": "latent"}
    measured = auto_placement._measured
    with pipeline(target="onnxruntime:cpu", threads=2) as pipe:

        def measuring(*rest: Any) -> dict[str, float]:
            if beside == "call":
                pipe(**arguments)
            return measured(*rest)

        monkeypatch.setattr(auto_placement, "_measured", measuring)
        other = pipe.stream(**arguments)
        next(other)
        if beside == "done":
            other.result()
        pipe(**arguments, placement="auto")
        assert len(list(tmp_path.glob("cache/placements/*"))) == kept


def test_waiting_for_anothers_trial_can_be_cancelled(pipeline: Open) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    trying, go_on, calls = threading.Event(), threading.Event(), 0

    def hold() -> None:
        trying.set()
        assert go_on.wait(60)

    def cancel_at_the_second() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise CancelledError("generation", "cancelled")

    with pipeline() as pipe:
        auto, made = opened(pipe), list[tuple[str, list[str]]]()
        first = threading.Thread(target=lambda: made.append(asked(auto, ms, before=hold)), daemon=True)
        first.start()
        try:
            assert trying.wait(60)
            with pytest.raises(CancelledError):
                asked(auto, ms, before=cancel_at_the_second)
        finally:
            go_on.set()
            first.join(60)
        assert made[0][0] == "parallel"
        assert asked(auto, ms) == ("parallel", [])


@pytest.mark.parametrize("by", ["itself", "another"])
def test_what_is_known_waits_for_no_trial(pipeline: Open, by: str) -> None:
    ms = {"batched": 9.0, "parallel": 5.0, "sequential": 9.0}
    trying, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        trying.set()
        assert go_on.wait(60)

    def fail() -> None:
        raise CancelledError("generation", "waited for another's trial")

    with pipeline() as pipe:
        auto = opened(pipe)
        assert asked(auto if by == "itself" else opened(pipe), ms)[0] == "parallel"
        other = {"shape": (1, 4, 8, 8), "before": hold}
        first = threading.Thread(target=lambda: asked(auto, ms, **other), daemon=True)
        first.start()
        try:
            assert trying.wait(60)
            assert asked(auto, ms, before=fail) == ("parallel", [])
        finally:
            go_on.set()
            first.join(60)


@pytest.mark.parametrize(
    ("best", "before", "streams"),
    [("batched", None, {1}), ("sequential", None, {1}), ("parallel", None, {2}), ("batched", "parallel", {1, 2})],
)
def test_what_only_the_trial_needed_is_let_go_of(
    pipeline: Open, monkeypatch: pytest.MonkeyPatch, best: str, before: str | None, streams: set[int]
) -> None:
    """OpenVINO compiles a denoiser anew for two streams."""
    arguments: dict[str, Any] = {"prompt": "red", "seed": 7, "num_inference_steps": 2, "output_type": "latent"}
    tried: list[str] = []

    def measured(plan: Plan, shape: Any, placed: Mapping[str, Any], before: Any) -> dict[str, float]:
        tried.extend(placed)
        return {one: 1.0 if one == best else 2.0 for one in placed}

    monkeypatch.setattr(auto_placement, "_measured", measured)
    with pipeline(target="openvino:cpu", threads=2) as pipe:
        if before is not None:
            pipe(**arguments, placement=before)
        expected = pipe(**arguments, placement="auto")
        assert (expected.plan.placement, tried) == (best, EVERY)
        loaded = {key[2] for key in pipe._models._loaders if key[0] == "unet"}
        assert loaded == {key[4] for key in pipe._models._sessions if key[0] == "unet"} == streams
        again = pipe(**arguments, placement="auto")
        np.testing.assert_array_equal(again.latents, expected.latents)
        assert tried == EVERY


@pytest.mark.parametrize("failing", ["trial", "placing"])
def test_what_a_trial_loaded_is_let_go_of_where_the_generation_fails(
    pipeline: Open, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    arguments: dict[str, Any] = {"prompt": "red", "seed": 7, "num_inference_steps": 2, "output_type": "latent"}
    placed = sampling._placed

    def measured(plan: Plan, shape: Any, placed: Mapping[str, Any], before: Any) -> dict[str, float]:
        if failing == "trial":
            raise CancelledError("generation", "cancelled")
        monkeypatch.setattr(sampling, "_placed", failed)
        return dict.fromkeys(placed, 1.0)

    def failed(*_: Any, **__: Any) -> Any:
        raise ExecutionError("unet", "no memory")

    monkeypatch.setattr(auto_placement, "_measured", measured)
    with pipeline(target="openvino:cpu", threads=2) as pipe:
        expected = pipe(**arguments)
        with pytest.raises(ExecutionError, match=r"cancelled|no memory"):
            pipe(**arguments, placement="auto")
        assert {key[2] for key in pipe._models._loaders if key[0] == "unet"} == {1}
        monkeypatch.setattr(sampling, "_placed", placed)
        np.testing.assert_array_equal(pipe(**arguments).latents, expected.latents)


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
