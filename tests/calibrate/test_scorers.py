"""Scorers are found by their names, and known by their source."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tandemrt.bench.shapes import checker
from tandemrt.bench.shapes import scenes as shapes_scenes
from tandemrt.bench.shapes.scenes import render, scenes
from tandemrt.calibrate import scorers
from tandemrt.calibrate.scorers import scorer_of
from tandemrt.runtime.errors import ArgumentError, CalibrationError


def test_the_shapes_scorer_is_found_by_its_name():
    chosen = scenes(3, 3, "held_out")
    pictures = np.stack([render(scene) for scene in chosen])
    scorer = scorer_of("tandemrt.bench.shapes.checker:shows")
    assert scorer([scene.caption for scene in chosen], pictures) == (True, True, True)
    with pytest.raises(CalibrationError, match="no caption of the shapes family"):
        scorer(["a castle"], pictures[:1])


def test_a_scorer_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scores.py").write_text(
        "def bright(prompts, pictures):\n    return [p.mean() > 127 for p in pictures]\n"
    )
    path = list(sys.path)
    scorer = scorer_of("own_scores:bright")
    pictures = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 255)])
    assert scorer(["a", "b"], pictures) == (False, True)
    assert sys.path == path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1 / 0", r"own_scores:shows: failed \(ZeroDivisionError: division by zero\)"),
        ("None", r"failed \(TypeError: 'NoneType' object is not iterable\)"),
        ("[True, False]", "how many answers it gave, got 2, expected 1, one for each picture"),
        ("[[True, False]]", r"answer 0 of 1, got \[True, False\], expected True or False"),
        ("numpy.zeros((1, 2), bool)", r"failed \(ValueError: .*more than one element"),
        ("[True, 0.3]", r"^--scorer own_scores:shows: answer 1 of 2, got 0.3, expected True or False. Compare scores"),
        ("numpy.array([float('nan')])", "answer 0 of 1, got .*nan.*, expected True or False"),
        ("[0.83]", "answer 0 of 1, got 0.83, expected True or False"),
        ("['no']", "answer 0 of 1, got 'no', expected True or False"),
        ("[None]", "answer 0 of 1, got None, expected True or False"),
    ],
)
def test_a_scorer_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    (tmp_path / "own_scores.py").write_text(f"import numpy\n\n\ndef shows(prompts, pictures):\n    return {given}\n")
    scorer = scorer_of("own_scores:shows")
    with pytest.raises(CalibrationError, match=message):
        scorer(["a"], np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("given", ["[1, 0]", "numpy.array([1.0, 0.0])", "numpy.array([[True], [False]])"])
def test_answers_may_be_numbers_that_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    (tmp_path / "own_scores.py").write_text(f"import numpy\n\n\ndef shows(prompts, pictures):\n    return {given}\n")
    assert scorer_of("own_scores:shows")(["a", "b"], np.zeros((2, 8, 8, 3), np.uint8)) == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tandemrt.bench.shapes.checker", "not a scorer"),
        ("os; x:y", "not a scorer"),
        ("tandemrt.bench.shapes.checker:", "not a scorer"),
        ("tandemrt.bench.shapes.checker:sees", "no function sees"),
        ("tandemrt.bench.shapes.checker:MINIMUM_IOU", "no function MINIMUM_IOU"),
        ("no_such_module:shows", "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_what_is_no_scorer_is_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        scorer_of(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a scorer that uses a module and a package beside it, and one that it does not use."""
    (tmp_path / "scores_here.py").write_text(
        "import my_limits\n\ndef bright(prompts, pictures):\n    from my_net.layers import add\n    return []\n"
    )
    (tmp_path / "my_limits.py").write_text("LIMIT = 127\n")
    (tmp_path / "my_net").mkdir()
    (tmp_path / "my_net" / "__init__.py").touch()
    (tmp_path / "my_net" / "layers.py").write_text("from . import sums\nadd = sums.add\n")
    (tmp_path / "my_net" / "sums.py").write_text("def add(): pass\n")
    (tmp_path / "others.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["scores_here.py", "my_limits.py", "my_net/layers.py", "my_net/sums.py"])
def test_a_scorer_that_was_changed_is_another_one(here: Path, name: str) -> None:
    """Whatever of its own it uses, and wherever it imports that."""
    before = scorer_of("scores_here:bright")
    assert (before.name, len(before.sha256)) == ("scores_here:bright", 64)
    (here / "others.py").write_text("x = 2\n")
    assert scorer_of("scores_here:bright").sha256 == before.sha256
    (here / name).write_text((here / name).read_text() + "# other\n")
    importlib.invalidate_caches()
    assert scorer_of("scores_here:bright").sha256 != before.sha256


def test_the_shapes_scorer_is_known_by_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    digest = scorers.file_sha256
    monkeypatch.setattr(scorers, "file_sha256", lambda path: read.append(path) or digest(path))
    scorer_of("tandemrt.bench.shapes.checker:shows")
    assert {Path(checker.__file__), Path(shapes_scenes.__file__)} <= set(read)
    assert all(path.parent == Path(checker.__file__).parent for path in read)
