"""Trajectories: what is kept is what the models were given, evenly."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tandemrt.calibrate.prompts import read_prompts
from tandemrt.calibrate.strata import kept_rows, turns
from tandemrt.calibrate.trajectories import Trajectories
from tandemrt.runtime import CalibrationError, Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.safetensors_files import read_header
from tandemrt.runtime.tokenizer import PromptTokenizer

from ..runtime.recorded import Recorded
from ..runtime.tiny_bundle import MAX_LENGTH, resign
from ..runtime.tiny_families import write_tiny_lcm, write_tiny_sd3, write_tiny_sdxl
from .collecting import PROMPTS, STEPS, Collect, error_of


def test_every_denoiser_is_kept_at_every_row_as_often_in_both_branches(
    collect: Collect, tiny_bundle: Path, tmp_path: Path
) -> None:
    assert collect("--rows", STEPS) == 0
    kept = Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle))
    for name in ("unet", "unet_small"):
        samples = list(kept.samples(name))
        counts = Counter(float(sample["timestep"][0]) for sample in samples)
        assert len(counts) == STEPS
        assert set(counts.values()) == {len(PROMPTS)}  # half of the prompts, two branches
        texts = {sample["encoder_hidden_states"].tobytes() for sample in samples}
        assert len(texts) == len(PROMPTS)  # all but the one that the other denoiser painted alone, and the negative one
        assert kept.count(name) == len(samples)
        assert_equal(kept.samples(name), samples)
        some = list(kept.samples(name, 2 * STEPS))
        assert Counter(float(sample["timestep"][0]) for sample in some) == dict.fromkeys(counts, 2)
        taken = iter(map(str, samples))
        assert all(str(sample) in taken for sample in some)  # in their order
    assert kept.prompts == PROMPTS


def test_what_is_kept_is_what_the_models_were_given(collect: Collect, tiny_bundle: Path, tmp_path: Path) -> None:
    assert collect("--guidance-scale", 3, "--seed", 11) == 0
    kept, names = Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle)), ("unet", "unet_small")
    expected: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    latents = []
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        recorded = Recorded(pipeline)
        for index, prompt in enumerate(PROMPTS):
            steps = turns(names, STEPS, index)
            given = {name: recorded.sessions[name].given for name in names}
            for runs in given.values():
                runs.clear()
            arguments = {"seed": 11 + index, "guidance_scale": 3.0, "placement": "sequential"}
            latents.append(pipeline(prompt, steps=steps, **arguments, output_type="latent").latents)
            ran = [name for name, count in steps for _ in range(count)]
            for row in kept_rows(STEPS, 2, index // 2, 3):
                first = 2 * ran[:row].count(ran[row])  # before it, both branches of every row
                expected[ran[row]] += given[ran[row]][first : first + 2]
    for name, runs in expected.items():
        assert_equal(kept.samples(name), runs)
    for name in ("vae_decoder", "vae_decoder_tiny"):
        assert_equal(kept.samples(name), [{"latent_sample": one} for one in latents])


def assert_equal(got: Iterator[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    """The same runs, bit for bit."""
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]) for key in one)


def test_branches_and_time_steps_are_told_in_the_files(collect: Collect, tmp_path: Path) -> None:
    assert collect() == 0
    told = read_header(tmp_path / "out" / "prompt-00002.safetensors").metadata
    runs = json.loads(told["runs"])
    assert told["prompt"] == PROMPTS[2]
    assert [run[0] for run in runs if run[1] is None] == ["text_encoder", "vae_decoder"]
    assert [run for run in runs if run[1] is not None] == [
        ["unet", 0, 999.0, "conditional"],
        ["unet", 0, 999.0, "unconditional"],
        ["unet_small", 3, 400.0, "conditional"],
        ["unet_small", 3, 400.0, "unconditional"],
    ]


def test_text_encoders_are_kept_with_each_prompt_and_the_negative_one_once(
    collect: Collect, tiny_bundle: Path, tmp_path: Path
) -> None:
    assert collect("--negative-prompt", "blue") == 0
    opened = Bundle.open(tiny_bundle)
    samples = list(Trajectories.open(tmp_path / "out", opened).samples("text_encoder"))
    tokenizer = PromptTokenizer(opened.tokenizer_path("text_encoder"), MAX_LENGTH)
    expected = tokenizer.tokenize([PROMPTS[0], "blue", *PROMPTS[1:]]).ids
    assert np.array_equal(np.concatenate([sample["input_ids"] for sample in samples]), expected)


def test_without_guidance_one_branch_is_kept(collect: Collect, tiny_bundle: Path, tmp_path: Path) -> None:
    assert collect("--guidance-scale", 1) == 0
    assert Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle)).count("unet") == len(PROMPTS)


def test_steps_by_denoiser_are_every_prompt_s(collect: Collect, tiny_bundle: Path, tmp_path: Path) -> None:
    assert collect("--steps", "unet:2,unet_small:3", "--rows", 5) == 0
    kept = Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle))
    assert {name: kept.count(name) for name in ("unet", "unet_small")} == {"unet": 24, "unet_small": 36}


def test_the_plan_says_what_is_kept(collect: Collect, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert collect("--print-plan") == 0
    assert "unet: 12 runs kept, 2 to 4 of each of 5 rows" in capsys.readouterr().out.splitlines()
    assert collect("--print-plan", "--json", "--denoiser", "unet", "-n", 5) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["prompts"], planned["there"], planned["kept"]) == (5, 0, {"unet": [6, 4, 4, 4, 2]})
    assert not (tmp_path / "out").exists()
    assert collect("--json", "--denoiser", "unet", "-n", 5) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == planned["kept"]


def test_a_denoiser_with_a_scheduler_of_its_own_is_visited_alone(
    collect: Collect, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def own(manifest: Manifest) -> Manifest:
        config = {**manifest.scheduler.config, "timestep_spacing": "trailing"}
        scheduler = msgspec.structs.replace(manifest.scheduler, config=config)
        small = msgspec.structs.replace(manifest.components["unet_small"], scheduler=scheduler)
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet_small": small})

    apart = tmp_path / "apart"
    shutil.copytree(tiny_bundle, apart)
    resign(apart, own)
    assert collect(of=apart) == 0
    kept = Trajectories.open(tmp_path / "out", Bundle.open(apart))
    assert kept.count("unet") == 24
    with pytest.raises(CalibrationError, match=r"nothing is kept of unet_small.*Collect with `--denoiser unet_small`"):
        kept.samples("unet_small")
    assert collect("--denoiser", "unet", "--denoiser", "unet_small", of=apart, out="both") == 2
    assert "unet_small has a scheduler of its own" in error_of(capsys)
    assert collect("--denoiser", "unet_small", "--steps", 1, of=apart, out="small") == 0
    assert Trajectories.open(tmp_path / "small", Bundle.open(apart)).count("unet_small") == 12


@pytest.mark.parametrize(
    ("write", "runs"),
    [
        (write_tiny_sdxl, {"text_encoder": 2, "text_encoder_2": 2, "unet": 8}),  # no negative prompt is none at all
        (write_tiny_sd3, {"text_encoder": 3, "text_encoder_2": 3, "text_encoder_3": 3, "transformer": 8}),
        (write_tiny_lcm, {"text_encoder": 2, "unet": 4}),
    ],
)
def test_every_family_s_inputs_are_kept(
    collect: Collect, tmp_path: Path, write: Callable[[Path], Manifest], runs: dict[str, int]
) -> None:
    manifest = write(tmp_path / "family")
    (denoiser,) = (name for name in runs if manifest.components[name].role == "denoiser")
    assert collect("--denoiser", denoiser, "-n", 2, "--rows", 2, of=tmp_path / "family") == 0
    kept = Trajectories.open(tmp_path / "out", Bundle.open(tmp_path / "family"))
    assert {name: kept.count(name) for name in runs} == runs
    for name in runs:
        specs = manifest.components[name].inputs
        for sample in kept.samples(name):
            assert {key: (str(values.dtype), values.ndim) for key, values in sample.items()} == {
                spec.name: (spec.dtype, len(spec.shape)) for spec in specs
            }


@pytest.fixture(scope="module")
def shapes_trajectories(
    shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("shapes")
    prompts = folder / "prompts.csv"
    rows = [f'{at},"a {color} {shape}"' for at, (color, shape) in enumerate(zip(COLORS, SHAPES, strict=True))]
    prompts.write_text("\n".join(["id,caption", *rows]))
    given = ("--prompts", prompts, "--denoiser", "unet", "--denoiser", "unet_small", "--steps", 4, "--rows", 2)
    words = ("calibrate", "collect", shapes_bundle, *given, "--out", folder / "out", "--threads", 1)
    assert main([str(word) for word in words]) == 0
    yield folder, {"prompts": read_prompts(prompts)}


COLORS, SHAPES = ("red", "green", "blue", "pink"), ("circle", "ring", "star", "cross")


def test_the_trained_family_is_kept_evenly(
    shapes_trajectories: tuple[Path, dict[str, Any]], shapes_bundle: Path
) -> None:
    folder, expected = shapes_trajectories
    kept = Trajectories.open(folder / "out", Bundle.open(shapes_bundle))
    assert kept.prompts == expected["prompts"]
    for name in ("unet", "unet_small"):
        counts = Counter(float(sample["timestep"][0]) for sample in kept.samples(name))
        assert sorted(counts.values()) == [2, 2, 2, 2]
    assert kept.count("text_encoder") == 5
    assert all(np.isfinite(sample["latent_sample"]).all() for sample in kept.samples("vae_decoder_small"))
