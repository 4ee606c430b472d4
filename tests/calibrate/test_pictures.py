"""Pictures for measures that need thousands: one a prompt by index, whatever is beside it, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.calibrate import pictures
from tandemrt.calibrate.ledger import Ledger
from tandemrt.calibrate.run_folder import RunFolder
from tandemrt.runtime import Pipeline
from tandemrt.runtime.cli import main
from tandemrt.runtime.cli.picture_files import read_picture

from ..runtime.tiny_bundle import write_tiny_bundle

PROMPTS = ("a red square", "a blue circle, large", "red", "blue red", "a blue square")

Run = Callable[..., int]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def run(bundle: Path, tmp_path: Path) -> Run:
    table = tmp_path / "captions.csv"
    table.write_text("id,caption\n" + "\n".join(f'{index},"{prompt}"' for index, prompt in enumerate(PROMPTS)))

    def run(*arguments: str, out: str = "out") -> int:
        settings = ("--target", "onnxruntime:cpu:fp32", "--threads", "1", "--steps", "2", "--out", str(tmp_path / out))
        return main(["calibrate", "pictures", str(bundle), "--prompts", str(table), *settings, *arguments])

    return run


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(read_picture("picture", path).image)


def test_each_picture_is_that_of_its_prompt_and_seed(bundle: Path, tmp_path: Path, run: Run) -> None:
    """The number of prompts painted together, and which, change no picture."""
    assert run("--seed", "5", "--batch", "2") == 0
    assert run("--seed", "5", "--batch", "3", "-n", "4", out="others") == 0
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in files] == [f"{index:06d}.png" for index in range(5)]
    with Pipeline.open(bundle, "onnxruntime:cpu:fp32", threads=1) as pipe:
        for index, (path, prompt) in enumerate(zip(files, PROMPTS, strict=True)):
            told = read_picture("picture", path).image.info
            assert (told["prompt"], told["seed"]) == (prompt, str(5 + index))
            np.testing.assert_array_equal(pixels(path), np.asarray(pipe(**json.loads(told["request"])).images[0]))
    for path in (tmp_path / "others").glob("*.png"):
        np.testing.assert_array_equal(pixels(path), pixels(tmp_path / "out" / path.name))
    assert len(list((tmp_path / "others").glob("*.png"))) == 4


def test_an_interrupted_run_goes_on(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there stays as it is, byte for byte; the rest is what a run at once makes."""
    add = RunFolder.add

    def interrupted(self: RunFolder, name: str, *given: Any) -> None:
        if name == "000003.png":
            raise KeyboardInterrupt
        add(self, name, *given)

    assert run(out="at-once") == 0
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "add", interrupted)
        assert run() == 130
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.png")) == ["000000.png", "000001.png", "000002.png"]
    (out / "000001.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    capsys.readouterr()
    assert run("--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["made"] == 3
    assert "goes on with 2 of 5 pictures there" in told.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for path in (tmp_path / "at-once").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_prompts_that_come_again_are_told_and_quality_knows_whose_pictures_are(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures of a file's first prompts are measured with the whole file, whichever of its lines were left out."""
    table = tmp_path / "captions.csv"
    table.write_text("id,caption\n1,a red square\n2,A red  square\n3,\n4,blue\n5,a red square\n6,red\n7,red\n")
    assert run("-n", "2", "--json") == 0
    told = capsys.readouterr()
    assert "2 lines of the prompts' file hold a prompt again, which is painted once" in told.err
    assert json.loads(told.out)["repeated"] == 2
    facts = [json.loads(line) for line in (tmp_path / "out" / "run.jsonl").read_text().splitlines()[1:]]
    assert [one["line"] for line in facts for one in line.values()] == [2, 5]
    (tmp_path / "scores_of_prompts.py").write_text(
        "def shows(prompts, pictures):\n    return [text == 'blue' for text in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    scored = ("--scorer", "scores_of_prompts:shows", "--prompts", "captions.csv", "--json")
    assert main(["calibrate", "quality", "out", *scored]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["measures"]["scorer"]["share"] == 0.5
    assert "prompts are those in the pictures, all of which captions.csv holds" in told.err
    table.write_text("caption\na red square\ngreen\ngreen\n")
    assert main(["calibrate", "quality", "out", *scored]) == 2
    assert "prompts, got 3, expected 2, one for each picture" in capsys.readouterr().out


def test_a_picture_that_is_not_what_was_painted_is_painted_again(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reuse is decided by digest, not by a file's existence."""
    assert run() == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "000001.png").write_bytes(before["000002.png"])
    (out / "000003.png").write_bytes(before["000003.png"][:-9])
    capsys.readouterr()
    assert run("--print-plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 2
    assert run("--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["made"] == 2
    assert all(f"{name}: missing or damaged, it is made again" in told.err for name in ("000001.png", "000003.png"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_more_prompts_are_painted_beside_what_is_there(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-n", "2") == 0
    capsys.readouterr()
    assert run("-n", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["made"] == 2
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out)["made"] == 1
    assert run(out="at-once") == 0
    for path in (tmp_path / "at-once").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "captions.csv").write_text("id,caption\n0,a red square\n1,red\n")
    assert run() == 2
    assert "holds 000001.png of another prompt, got 'a blue circle, large', expected red" in capsys.readouterr().err


def test_a_picture_of_somebody_else_is_not_replaced(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-n", "2") == 0
    (tmp_path / "out" / "000002.png").write_bytes(b"mine")
    assert run() == 2
    assert "000002.png: is there, and not of this run" in capsys.readouterr().err
    assert (tmp_path / "out" / "000002.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (("--seed", "1"), "seed is 0 there, 1 here"),
        (("--guidance-scale", "3"), "guidance_scale is None there, 3.0 here"),
        (("-n", "3"), "holds 000003.png, beyond the last prompt"),
        (("--steps", "3"), "steps is '2' there, '3' here"),
    ],
)
def test_other_settings_are_refused_unless_they_begin_anew(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], other: tuple[str, ...], told: str
) -> None:
    assert run() == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run(*other) == 2
    refusal = capsys.readouterr().err
    assert told in refusal
    assert "--discard to start over" in refusal
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run(*other, "--discard") == 0
    expected = 3 if other[0] == "-n" else 5
    assert len(list((tmp_path / "out").glob("*.png"))) == expected
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_another_version_of_the_backend_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may round otherwise, and a folder's pictures are compared with another's."""
    assert run("-n", "1") == 0
    monkeypatch.setattr(pictures, "installed_version", lambda backend: f"{backend} 99")
    assert run() == 2
    assert "holds another run: versions onnxruntime is '" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.png").write_bytes(b"mine")
    assert run("--discard") == 2
    assert "holds other files and no run.jsonl, got 'holiday.png'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["holiday.png"]


def test_only_the_files_of_a_run_are_discarded(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run() == 0
    mine = ("1.png", "000005.png", "20240101.png")
    for name in mine:
        (out / name).write_bytes(b"mine")
    assert run("--seed", "1", "--discard") == 0
    assert all((out / name).read_bytes() == b"mine" for name in mine)


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with Ledger(tmp_path / "out" / "run.jsonl", {}):
        assert run("--discard") == 1
    assert "another run is writing it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-n", "6"), "prompts, got 5, expected -n 6. Give -n 5, or more prompts."),
        (("--batch", "0"), "--batch: not usable, got 0"),
        (("--steps", "2,x"), "steps"),
        (("--width", "65"), "width"),
        (("--column", "capton"), "did you mean 'caption'"),
    ],
)
def test_what_cannot_be_painted_is_told_before_anything_is_written(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    assert run(*arguments) == 2
    assert told.lower() in capsys.readouterr().err.lower()
    assert not (tmp_path / "out").exists()


def test_a_bundle_takes_no_pictures(bundle: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", str(bundle / "pictures")) == 2
    assert "inside the bundle" in capsys.readouterr().err
    assert not (bundle / "pictures").exists()


def test_what_would_be_painted_is_told(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--print-plan", "-n", "4") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["count"], facts["missing"]) == (4, 4)
    assert not (tmp_path / "out").exists()
