"""Adaptive guidance: which rows run one branch, what stands for the other, what is reported and what refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import Pipeline, RequestError
from tandemrt.runtime.adaptive import AdaptiveGuidance, AdaptiveRule
from tandemrt.runtime.binding import Conditioning
from tandemrt.runtime.cli import main
from tandemrt.runtime.placement import Batched, Worker
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.state import State

from ..interop.picture import psnr_db
from .test_sampler import SHAPE, Denoiser, plan
from .tiny_bundle import write_tiny_bundle

RULE = AdaptiveRule(threshold=0.1, release=0.2, probe=3)
ONE = np.ones((1, 1, 2, 2), np.float32)


def walked(discrepancies: list[float], denoisers: str = "") -> list[bool]:
    """Which of so many rows run both branches, where those that do find their branches so far apart."""
    guidance, rows = AdaptiveGuidance(RULE), []
    for row, discrepancy in enumerate(discrepancies):
        rows.append(guidance.wanted(denoisers[row] if denoisers else "unet"))
        if rows[-1]:
            guidance.saw(ONE, ONE, discrepancy)
        else:
            guidance.guide(ONE.copy(), 5.0, np.empty_like(ONE))
    return rows


def shown(rows: list[bool]) -> str:
    return "".join("g" if guided else "." for guided in rows)


@pytest.mark.parametrize(
    ("discrepancies", "denoisers", "expected"),
    [
        ([0.5] * 6, "", "gggggg"),
        ([0.5, 0.1, 0.09, 0, 0, 0.05, 0, 0, 0.05], "", "ggg..g..g"),
        # Once they agree, only what reaches `release` brings guidance back.
        ([0.05, 0.05, 0, 0, 0.15, 0, 0, 0.2, 0.15, 0.05, 0], "", "gg..g..ggg."),
        # Another denoiser's branches are looked at first, twice to see whether their difference is steady.
        ([0.05] * 9, "lllssslll", "gg.gg.gg."),
    ],
    ids=["apart", "agree", "hysteresis", "hybrid"],
)
def test_which_rows_run_both_branches(discrepancies: list[float], denoisers: str, expected: str) -> None:
    assert shown(walked(discrepancies, denoisers)) == expected


def followed(differences: list[np.ndarray]) -> tuple[str, list[np.ndarray]]:
    """Which rows run both branches, with these differences and a discrepancy that is never far, and what is added."""
    guidance, rows, added = AdaptiveGuidance(RULE), [], []
    for difference in differences:
        rows.append(guidance.wanted("unet"))
        if rows[-1]:
            guidance.saw(ONE + difference, ONE, 0.05)
        else:
            assert guidance.why == "the branches agree: they were 0.05 apart"
            prediction = 4 * ONE
            guidance.guide(prediction, 5.0, np.empty_like(ONE))
            added.append((prediction - 4) / 4)
    return shown(rows), added


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_the_last_difference_stands_for_the_branch_left_out_and_goes_on_as_it_did(ratio: float) -> None:
    rows, added = followed([ONE * ratio**row for row in range(8)])
    assert rows == "gg..g..g"
    np.testing.assert_allclose(added, [ONE * ratio**row for row in (2, 3, 5, 6)], rtol=1e-5)


def test_a_difference_that_is_not_steady_keeps_both_branches() -> None:
    turned = ONE * np.array([1, -1], np.float32)
    assert followed([ONE * 1.4**row for row in range(6)])[0] == "gggggg"
    assert followed([ONE * 0.7**row for row in range(6)])[0] == "gggggg"
    assert followed([ONE, turned, ONE, -ONE, -ONE, -ONE])[0] == "ggggg."
    # At a look three rows on, what counts is the change a row.
    assert followed([ONE, ONE, ONE, ONE, 1.9 * ONE, ONE, ONE])[0] == "gg..g.."
    assert followed([ONE, ONE, ONE, ONE, 2 * ONE, ONE, ONE])[0] == "gg..ggg"


def sampled(**arguments: Any) -> tuple[np.ndarray, list[Any]]:
    compiled = plan(20, **arguments)
    branches = [{"encoder_hidden_states": np.full((SHAPE[0], 5, 3), value, np.float32)} for value in (0.3, 0.25)]
    placed = Batched(Worker(compiled, {"unet": Denoiser()}, {"unet": Conditioning(*branches)}))
    runner = Sampler(compiled, placed, lambda out: out.fill(0))
    state = State.begin(compiled.table, np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    return state.latents, [row.guidance for row in runner.run(state)]


def test_rows_left_out_are_reported_and_change_little() -> None:
    fixed, every = sampled()
    adaptive, rows = sampled(guidance="adaptive", guidance_config={"threshold": 0.2})
    skipped = [row for row in rows if not row.guided]
    assert all(row.guided for row in every)
    assert 8 <= len(skipped) < 16
    assert {row.discrepancy for row in skipped} == {row.growth for row in skipped} == {None}
    assert rows[0].growth is None
    assert all(row.growth > 0 for row in rows[1:] if row.guided)
    assert all(row.why.startswith("the branches agree: they were 0.0") for row in skipped)
    unguided, _ = sampled(guidance_scale=1.0)
    assert 0 < np.abs(adaptive - fixed).mean() < 0.25 * np.abs(unguided - fixed).mean()


def test_a_threshold_no_row_reaches_changes_no_bit() -> None:
    np.testing.assert_array_equal(sampled(guidance="adaptive", guidance_config={"threshold": 1e-9})[0], sampled()[0])


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "openvino:cpu"])
def test_every_placement_leaves_out_the_same_rows(tmp_path: Path, target: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    arguments: dict[str, Any] = {"seed": 7, "steps": {"unet": 6, "unet_small": 6}, "output_type": "np"}
    with Pipeline.open(tmp_path / "bundle", target, threads=2) as pipeline:
        expected = None
        for placement in ("batched", "sequential", "parallel"):
            given = {"guidance": "adaptive", "guidance_config": {"threshold": 1.0}, "placement": placement}
            out = pipeline("red", **arguments, **given)
            expected = expected or out
            assert shown([row.guided for row in out.plan.ran]) == "ggg...gg...g"
            assert psnr_db(out.images[0], expected.images[0]) >= 60.0
        assert "guidance 5 on 6 of 12 rows" in repr(out.plan)
        fixed = pipeline("red", **arguments, guidance_interval=(0.0, 0.5))
        assert [row.why for row in fixed.plan.ran] == ["guided"] * 6 + ["outside guidance_interval"] * 6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (3, "guidance_config: type, got 3"),
        ({"treshold": 1}, r"guidance_config: unknown key, got 'treshold'.*Did you mean 'threshold'\?"),
        ({"threshold": 0}, "guidance_config: threshold: discrepancy, got 0, expected a number above 0"),
        ({"threshold": float("nan")}, "guidance_config: threshold"),
        ({"threshold": "0.1"}, "guidance_config: threshold"),
        ({"steady": 1}, "guidance_config: steady: change from row to row, got 1, expected a number above 1"),
        ({"probe": 1}, "guidance_config: probe: rows, got 1, expected a whole number, 2 or more"),
        ({"probe": 2.5}, "guidance_config: probe"),
        ({"threshold": 0.3, "release": 0.2}, "guidance_config: release: discrepancy, got 0.2, expected threshold, 0.3"),
    ],
)
def test_numbers_that_cannot_be_are_refused(config: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        plan(4, guidance="adaptive", guidance_config=config)


def test_guidance_of_another_kind_is_refused() -> None:
    with pytest.raises(RequestError, match=r"guidance: unknown, got 'adaptiv'.*Did you mean 'adaptive'\?"):
        plan(4, guidance="adaptiv")
    with pytest.raises(RequestError, match="guidance_config: given without adaptive guidance"):
        plan(4, guidance_config={"probe": 3})


def test_the_command_line_asks_for_adaptive_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    common = ["generate", str(tmp_path / "bundle"), "--prompt", "red", "--guidance", "adaptive", "--print-plan"]
    assert main([*common, "--guidance-config", "threshold=0.2"]) == 0
    printed = capsys.readouterr().out
    assert "adaptive (threshold 0.2, release 0.3" in printed
    assert main([*common, "--guidance-config", "threshold=-1"]) == 2
