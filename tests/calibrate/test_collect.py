"""Trajectories: what is kept is what the models were given, evenly, whether or not it was interrupted."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tandemrt.calibrate.ledger import Ledger
from tandemrt.calibrate.prompts import read_prompts
from tandemrt.calibrate.run_folder import RunFolder
from tandemrt.calibrate.strata import kept_rows, turns
from tandemrt.calibrate.trajectories import RECORD_NAME, Trajectories
from tandemrt.runtime import CalibrationError, Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.cli.reporter import ConsoleReporter
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.safetensors_files import read_header
from tandemrt.runtime.tokenizer import PromptTokenizer

from ..runtime.recorded import Recorded
from ..runtime.tiny_bundle import MAX_LENGTH, resign, write_tiny_bundle
from ..runtime.tiny_families import write_tiny_lcm, write_tiny_sd3, write_tiny_sdxl

PROMPTS = ("red", "blue red", "a red blue", "blue blue", "red a", "blue a")
STEPS = 5
Collect = Callable[..., int]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collect") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def collect(bundle: Path, prompts: Path, tmp_path: Path) -> Collect:
    """Runs the command; further arguments come last, so that they win."""

    def collected(*arguments: object, out: str = "out", of: Path = bundle) -> int:
        given = ("--prompts", prompts, "--steps", STEPS, "--rows", 2, "--threads", 1, "--out", tmp_path / out)
        return main([str(word) for word in ("calibrate", "collect", of, *given, *arguments)])

    return collected


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_every_denoiser_is_kept_at_every_row_as_often_in_both_branches(
    collect: Collect, bundle: Path, tmp_path: Path
) -> None:
    assert collect("--rows", STEPS) == 0
    kept = Trajectories.open(tmp_path / "out", Bundle.open(bundle))
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


def test_what_is_kept_is_what_the_models_were_given(collect: Collect, bundle: Path, tmp_path: Path) -> None:
    assert collect("--guidance-scale", 3, "--seed", 11) == 0
    kept, names = Trajectories.open(tmp_path / "out", Bundle.open(bundle)), ("unet", "unet_small")
    expected: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    latents = []
    with Pipeline.open(bundle, threads=1) as pipeline:
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
    collect: Collect, bundle: Path, tmp_path: Path
) -> None:
    assert collect("--negative-prompt", "blue") == 0
    opened = Bundle.open(bundle)
    samples = list(Trajectories.open(tmp_path / "out", opened).samples("text_encoder"))
    tokenizer = PromptTokenizer(opened.tokenizer_path("text_encoder"), MAX_LENGTH)
    expected = tokenizer.tokenize([PROMPTS[0], "blue", *PROMPTS[1:]]).ids
    assert np.array_equal(np.concatenate([sample["input_ids"] for sample in samples]), expected)


def test_without_guidance_one_branch_is_kept(collect: Collect, bundle: Path, tmp_path: Path) -> None:
    assert collect("--guidance-scale", 1) == 0
    assert Trajectories.open(tmp_path / "out", Bundle.open(bundle)).count("unet") == len(PROMPTS)


def test_steps_by_denoiser_are_every_prompt_s(collect: Collect, bundle: Path, tmp_path: Path) -> None:
    assert collect("--steps", "unet:2,unet_small:3", "--rows", 5) == 0
    kept = Trajectories.open(tmp_path / "out", Bundle.open(bundle))
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


class InterruptedReporter(ConsoleReporter):
    """Interrupts when so many rows are painted."""

    rows = 3 * STEPS + 2

    def progress(self, label: str, done: int, total: int) -> None:
        if done == self.rows:
            raise KeyboardInterrupt
        super().progress(label, done, total)


def test_an_interrupted_run_goes_on_to_the_same_files(
    collect: Collect, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr("tandemrt.runtime.cli.program.ConsoleReporter", InterruptedReporter)
        assert collect() == 130
    assert sorted(files(tmp_path / "out")) == [*(f"prompt-0000{index}.safetensors" for index in range(3)), RECORD_NAME]
    with pytest.raises(CalibrationError, match="unfinished: how many files, got 3, expected those of 6 prompts"):
        Trajectories.open(tmp_path / "out", Bundle.open(bundle))
    capsys.readouterr()
    # As when it was killed between a line and its file.
    (tmp_path / "out" / "prompt-00002.safetensors").unlink()
    assert collect("--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["painted"] == 4
    assert "goes on with 2 of 6 prompts there" in told.err
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert collect("--json") == 0
    assert json.loads(capsys.readouterr().out)["painted"] == 0


def test_each_prompt_adds_a_line_and_rewrites_nothing(
    collect: Collect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of prompts would otherwise write as many records of thousands of lines."""
    record, seen = tmp_path / "out" / RECORD_NAME, list[tuple[int, bytes]]()
    add = RunFolder.add

    def watched(self: RunFolder, *given: Any) -> None:
        add(self, *given)
        seen.append((record.stat().st_ino, record.read_bytes()))

    monkeypatch.setattr(RunFolder, "add", watched)
    assert collect() == 0
    assert len({inode for inode, _ in seen}) == 1
    assert [content.count(b"\n") for _, content in seen] == [2, 3, 4, 5, 6, 7]
    assert all(later.startswith(earlier) for (_, earlier), (_, later) in itertools.pairwise(seen))


def test_what_is_lost_or_damaged_is_named_and_made_again(
    collect: Collect, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0
    before, opened = files(tmp_path / "out"), Bundle.open(bundle)
    lost, flipped = (tmp_path / "out" / f"prompt-0000{index}.safetensors" for index in (1, 4))
    flipped.write_bytes(before[flipped.name][:-1] + b"!")
    kept = Trajectories.open(tmp_path / "out", opened)
    with pytest.raises(CalibrationError, match=rf"{flipped.name}: damaged: sha256, got"):
        list(kept.samples("unet"))
    lost.unlink()
    with pytest.raises(CalibrationError, match=rf"{lost.name}: cannot be read \(No such file"):
        Trajectories.open(tmp_path / "out", opened)
    capsys.readouterr()
    assert collect() == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "missing or damaged" in line]
    assert [Path(line.split(": ")[1]).name for line in warned] == [lost.name, flipped.name]
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", 1), "seed is 0 there, 1 here"),
        (("--guidance-scale", 2), "guidance_scale is 5.0 there, 2.0 here"),
        (("--steps", 4), "steps is 5 there, 4 here"),
        (("--rows", 3), "rows is 2 there, 3 here"),
        (("--height", 80), "height is 64 there, 80 here"),
        (("-n", 4), "prompts are 6 there, 4 here"),
    ],
)
def test_other_settings_are_refused_until_what_is_there_is_discarded(
    collect: Collect,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    words: str,
) -> None:
    assert collect() == 0
    before = files(tmp_path / "out")
    assert collect(*arguments) == 2
    told = error_of(capsys)
    assert words in told
    assert "--discard" in told
    assert files(tmp_path / "out") == before
    assert collect(*arguments, "--discard") == 0
    assert collect(*arguments, out="fresh") == 0
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_another_bundle_is_refused_and_one_with_other_defaults_is_not(
    collect: Collect, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0
    other, tuned = tmp_path / "other", tmp_path / "tuned"
    for copy, edit in ((other, with_other_unet), (tuned, with_other_guidance)):
        shutil.copytree(bundle, copy)
        resign(copy, edit)
    assert collect(of=other) == 2
    assert "bundle is " in error_of(capsys)
    opened = Bundle.open(other)
    with pytest.raises(
        CalibrationError, match=f"of another bundle, got '{Bundle.open(bundle).digest}', expected"
    ) as no:
        Trajectories.open(tmp_path / "out", opened)
    assert opened.digest in str(no.value)
    assert Trajectories.open(tmp_path / "out", Bundle.open(tuned)).count("unet") == 12


def with_other_unet(manifest: Manifest) -> Manifest:
    unet = manifest.components["unet_small"]
    unet = msgspec.structs.replace(unet, source=msgspec.structs.replace(unet.source, sha256="1" * 64))
    return msgspec.structs.replace(manifest, components={**manifest.components, "unet_small": unet})


def with_other_guidance(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, defaults=msgspec.structs.replace(manifest.defaults, guidance_scale=2.0))


def test_a_denoiser_with_a_scheduler_of_its_own_is_visited_alone(
    collect: Collect, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def own(manifest: Manifest) -> Manifest:
        config = {**manifest.scheduler.config, "timestep_spacing": "trailing"}
        scheduler = msgspec.structs.replace(manifest.scheduler, config=config)
        small = msgspec.structs.replace(manifest.components["unet_small"], scheduler=scheduler)
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet_small": small})

    apart = tmp_path / "apart"
    shutil.copytree(bundle, apart)
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-n", 7), "prompts.txt: prompts, got 6, expected -n 7. Give -n 6, or more prompts."),
        (("-n", 0), "-n: not usable, got 0, expected 1 to 100000."),
        (("-n", 1), "-n: number of prompts, got 1, expected 2 or more, one for each of unet, unet_small."),
        (("--rows", 0), "--rows: number of rows, got 0, expected 1 or more."),
        (("--steps", "0"), "number of steps in all, got 0"),
        (("--steps", "5,x"), "not a number of steps, got 'x'"),
        (("--steps", "unet_large:5"), "unknown denoiser, got 'unet_large'"),
        (("--denoiser", "unet_smal"), "no such component, got 'unet_smal'"),
        (("--denoiser", "vae_decoder"), "no denoiser, got 'vae_decoder', expected one of unet, unet_small."),
        (("--denoiser", "unet", "--steps", "5,5"), "given beside --steps by denoiser"),
        (("--guidance-scale", "nan"), "guidance_scale: not usable"),
        (("--height", 63), "height: not usable, got 63"),
        (("--seed", 2**64 - 3), "seed"),
        (("--target", "abacus:cpu"), "backend, got 'abacus:cpu'"),
    ],
)
def test_arguments_that_cannot_be_used(
    collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], words: str
) -> None:
    assert collect(*arguments) == 2
    assert words in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_held_out_prompts_are_refused(collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("green\nBLUE  red\nred a\n")
    assert collect("--held-out", held_out) == 2
    assert "2 of them, the first is 'blue red'" in error_of(capsys)
    held_out.write_text("green\n")
    assert collect("--held-out", held_out) == 0


def test_a_folder_of_something_else_is_left_alone(
    collect: Collect, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for arguments in ((), ("--discard",)):
        assert collect(*arguments) == 2
        assert "holds other files and no trajectories.jsonl, got 'thesis.tex'" in error_of(capsys)
    assert list(files(tmp_path / "out")) == ["thesis.tex"]
    assert collect("--out", bundle / "kept") == 2
    assert "inside the bundle" in error_of(capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{\n", "not what a run left"),
        (b'{"format": 2}\n', "format, got 2, expected 1"),
        (b'{"format": 1}\n', "not a record of trajectories"),
        (b"\xff\xfe\n", "not what a run left"),
    ],
)
def test_a_damaged_record_is_told_and_can_be_discarded(
    collect: Collect, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_NAME).write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        Trajectories.open(tmp_path / "out", Bundle.open(bundle))
    assert collect() in (1, 2)
    assert "--discard" in error_of(capsys)
    assert collect("--discard", "-n", 2) == 0


def test_a_record_that_leaves_its_folder_is_refused(collect: Collect, bundle: Path, tmp_path: Path) -> None:
    assert collect("-n", 2) == 0
    path = tmp_path / "out" / RECORD_NAME
    path.write_bytes(path.read_bytes().replace(b"prompt-00001.safetensors", b"../prompt-001.safetensors"))
    with pytest.raises(CalibrationError, match=r"a file that belongs to no prompt, got '\.\./prompt-001"):
        Trajectories.open(tmp_path / "out", Bundle.open(bundle))


def test_no_trajectories_at_all(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no trajectories: no trajectories\.jsonl\. Make them: `tandemrt"):
        Trajectories.open(tmp_path, Bundle.open(bundle))


def test_two_runs_do_not_share_a_folder(collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with Ledger(tmp_path / "out" / RECORD_NAME, {}):
        assert collect() == 1
    assert "another run is writing it" in error_of(capsys)


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
