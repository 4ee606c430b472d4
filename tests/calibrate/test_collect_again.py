"""Trajectories that were begun: the same run goes on to the same files, and any other is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandemrt.calibrate.ledger import Ledger
from tandemrt.calibrate.run_folder import RunFolder
from tandemrt.calibrate.trajectories import RECORD_NAME, Trajectories
from tandemrt.runtime import CalibrationError
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli.reporter import ConsoleReporter
from tandemrt.runtime.manifest import Manifest

from ..runtime.tiny_bundle import resign
from .collecting import STEPS, Collect, error_of, files


class InterruptedReporter(ConsoleReporter):
    """Interrupts when so many rows are painted."""

    rows = 3 * STEPS + 2

    def progress(self, label: str, done: int, total: int) -> None:
        if done == self.rows:
            raise KeyboardInterrupt
        super().progress(label, done, total)


def test_an_interrupted_run_goes_on_to_the_same_files(
    collect: Collect,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert collect(out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr("tandemrt.runtime.cli.program.ConsoleReporter", InterruptedReporter)
        assert collect() == 130
    assert sorted(files(tmp_path / "out")) == [*(f"prompt-0000{index}.safetensors" for index in range(3)), RECORD_NAME]
    with pytest.raises(CalibrationError, match="unfinished: how many files, got 3, expected those of 6 prompts"):
        Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle))
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
    collect: Collect, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0
    before, opened = files(tmp_path / "out"), Bundle.open(tiny_bundle)
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
    collect: Collect, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect() == 0
    other, tuned = tmp_path / "other", tmp_path / "tuned"
    for copy, edit in ((other, with_other_unet), (tuned, with_other_guidance)):
        shutil.copytree(tiny_bundle, copy)
        resign(copy, edit)
    assert collect(of=other) == 2
    assert "bundle is " in error_of(capsys)
    opened = Bundle.open(other)
    with pytest.raises(
        CalibrationError, match=f"of another bundle, got '{Bundle.open(tiny_bundle).digest}', expected"
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
    collect: Collect, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for arguments in ((), ("--discard",)):
        assert collect(*arguments) == 2
        assert "holds other files and no trajectories.jsonl, got 'thesis.tex'" in error_of(capsys)
    assert list(files(tmp_path / "out")) == ["thesis.tex"]
    assert collect("--out", tiny_bundle / "kept") == 2
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
    collect: Collect, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_NAME).write_bytes(content)
    with pytest.raises(CalibrationError, match=words):
        Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle))
    assert collect() in (1, 2)
    assert "--discard" in error_of(capsys)
    assert collect("--discard", "-n", 2) == 0


def test_a_record_that_leaves_its_folder_is_refused(collect: Collect, tiny_bundle: Path, tmp_path: Path) -> None:
    assert collect("-n", 2) == 0
    path = tmp_path / "out" / RECORD_NAME
    path.write_bytes(path.read_bytes().replace(b"prompt-00001.safetensors", b"../prompt-001.safetensors"))
    with pytest.raises(CalibrationError, match=r"a file that belongs to no prompt, got '\.\./prompt-001"):
        Trajectories.open(tmp_path / "out", Bundle.open(tiny_bundle))


def test_no_trajectories_at_all(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no trajectories: no trajectories\.jsonl\. Make them: `tandemrt"):
        Trajectories.open(tmp_path, Bundle.open(tiny_bundle))


def test_two_runs_do_not_share_a_folder(collect: Collect, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with Ledger(tmp_path / "out" / RECORD_NAME, {}):
        assert collect() == 1
    assert "another run is writing it" in error_of(capsys)
