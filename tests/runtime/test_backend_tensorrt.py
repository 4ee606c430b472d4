"""TensorRT's flavours where there is no GPU: one sentence, nothing loaded; bindings on a stand-in for CUDA."""

from __future__ import annotations

import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandemrt.runtime import Pipeline, TargetError, targets
from tandemrt.runtime.backends import cuda, target_here
from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.backends.tensorrt import TensorRtSession
from tandemrt.runtime.backends.tensorrt_binding import TensorRtBinding, scratch_held
from tandemrt.runtime.cli import main
from tandemrt.runtime.manifest import TensorSpec
from tandemrt.runtime.targets import parse_target

from .stand_in_gpus import Gpus
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


class Context:
    """Stands for an execution context that wants so much scratch memory; `scratch` is what it was pointed at."""

    def __init__(self, wants: int) -> None:
        self.wants, self.scratch = wants, (0, 0)

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return (2, 3)

    def update_device_memory_size_for_shapes(self) -> int:
        return self.wants

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = address, size

    def __getattr__(self, name: str) -> Any:
        return lambda *_: True


def test_scratch_memory_that_grows_is_freed_first_and_records_anew() -> None:
    gpus = Gpus(["sm89"])
    specs = [TensorSpec(name=name, dtype="float32", shape=(2, 3)) for name in ("x", "y")]
    session: Any = SimpleNamespace(
        device=cuda.Device(gpus.runtime), inputs=specs[:1], outputs=specs[1:], generation=0, live=lambda: None
    )
    contexts = [Context(10), Context(100)]
    session.blocks = session.device.blocks(1)
    small, large = (TensorRtBinding(session, context, 0, {"x": (2, 3)}) for context in contexts)
    for _ in range(3):
        small.run()
    assert gpus.recorded == 1
    assert gpus.owned()[10] == 1
    runtime, beside = session.device.runtime, list[bool]()
    malloc = runtime.cudaMalloc
    runtime.cudaMalloc = lambda size: (beside.append(10 in gpus.owned()), malloc(size))[1]
    large.run()
    assert beside == [False]
    assert contexts[1].scratch[1] == 100
    for _ in range(3):
        small.run()
    assert contexts[0].scratch == contexts[1].scratch
    assert gpus.recorded == 2
    assert gpus.wrong == []


def test_runs_that_overlap_have_scratch_memory_of_their_own() -> None:
    gpus = Gpus(["sm89"])
    specs = [TensorSpec(name=name, dtype="float32", shape=(2, 3)) for name in ("x", "y")]
    session: Any = SimpleNamespace(
        device=cuda.Device(gpus.runtime), inputs=specs[:1], outputs=specs[1:], generation=0, live=lambda: None
    )
    contexts = [Context(50) for _ in range(5)]
    # Whatever order they were bound in, as by several threads.
    blocks = session.blocks = session.device.blocks(5)
    bindings = [TensorRtBinding(session, context, 0, {"x": (2, 3)}) for context in contexts]
    for _ in range(3):
        with ExitStack() as stack:
            for binding in bindings:
                stack.enter_context(scratch_held([binding]))
            assert all(block.lock.locked() for block in blocks)
    assert len({context.scratch[0] for context in contexts}) == 5
    moved = [context.scratch for context in contexts]
    for _ in range(3):
        for binding in bindings:
            binding.run()
    assert [context.scratch for context in contexts] == moved
    assert gpus.recorded == len(contexts)
    assert gpus.wrong == []
    assert not any(block.lock.locked() for block in blocks)
    assert session.device.blocks(2) == blocks[:2]


def test_kernels_are_saved_while_their_engine_is_there() -> None:
    class Freed:
        pass

    engine = Freed()
    alive, saved = weakref.ref(engine), list[bool]()
    session = TensorRtSession.__new__(TensorRtSession)
    session._loaded, session.device = engine, cuda.Device(Gpus(["sm89"]).runtime)
    session._kernels = SimpleNamespace(save=lambda: saved.append(alive() is not None))  # type: ignore[assignment]
    del engine
    session.close()
    session.close()
    assert saved == [True]
    assert alive() is None
