"""TensorRT's flavours where there is no GPU: one sentence, before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tandemrt.runtime import Pipeline, TargetError, targets
from tandemrt.runtime.backends import cuda, target_here
from tandemrt.runtime.backends.tensorrt import imported
from tandemrt.runtime.cli import main
from tandemrt.runtime.targets import parse_target

from .tiny_bundle import write_tiny_bundle

TARGETS = ("tensorrt-rtx:sm89:fp32", "tensorrt-rtx:portable", "tensorrt:sm90:fp16")


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "_NVIDIA", tmp_path / "none")
    monkeypatch.setattr(targets, "_NVIDIA_DEVICES", ())


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize("target", TARGETS)
def test_without_a_driver_nothing_is_opened(target: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as raised:
        Pipeline.open(tmp_path / "no bundle", target=target)
    assert str(raised.value) == (
        f"target {target}: needs an NVIDIA GPU, and no NVIDIA driver is running here. "
        "Use --target auto, or a machine with such a GPU."
    )
    with pytest.raises(TargetError, match="CUDA: no NVIDIA driver is running here"):
        target_here(parse_target(target))


@pytest.mark.usefixtures("no_driver")
def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    assert main(["generate", str(tmp_path / "bundle"), "--prompt", "red", "--target", "tensorrt-rtx:sm89:fp32"]) == 1
    stdout, stderr = capsys.readouterr()
    assert "Traceback" not in stderr
    assert "no NVIDIA driver is running here" in " ".join((stdout + stderr).split())


@pytest.mark.skipif(bool(targets.nvidia_gpus()), reason="there is a GPU")
def test_a_driver_that_shows_no_gpu_is_told_in_cudas_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device file without a driver behind it, as a container may have; CUDA itself is asked."""
    monkeypatch.setattr(targets, "_NVIDIA_DEVICES", (tmp_path,))
    with pytest.raises(TargetError, match=r"CUDA: no GPU can be used \(.*\)\. Use --target auto"):
        cuda.device()


def test_a_flavour_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TargetError, match=r'Run `pip install "tandemrt\[tensorrt\]"`'):
        imported("tensorrt")
