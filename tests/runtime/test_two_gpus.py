"""Two GPUs, in the host's memory: each branch on its own, every call with its GPU current, and what is refused."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tandemrt.runtime import Output, Pipeline
from tandemrt.runtime.backends import cuda
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import ArgumentError, EngineError, ExecutionError, TargetError
from tandemrt.runtime.variant import PLAIN

from .engine_writing import write_engines
from .stand_in_gpus import SCRATCH_BYTES, Gpus, Ran, stand_in
from .tiny_bundle import write_tiny_bundle
from .tiny_families import write_tiny_control

TARGET = "tensorrt-rtx:sm89:fp32"
ASKED: dict[str, Any] = {"prompt": "red", "negative_prompt": "blue", "seed": 7, "steps": {"unet": 2, "unet_small": 2}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpus") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def cache(bundle: Path, tmp_path: Path) -> Path:
    write_engines(tmp_path / "cache", bundle, "sm89")
    return tmp_path / "cache"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89", "sm89")


@pytest.fixture
def painted(bundle: Path, cache: Path, gpus: Gpus) -> Callable[..., Output]:
    def paint(target: str = TARGET, devices: tuple[int, ...] | None = (0, 1), **arguments: Any) -> Output:
        with Pipeline.open(bundle, target, cache=cache, devices=devices) as pipe:
            return pipe(**{**ASKED, "output_type": "np", **arguments})

    return paint


Painted = Callable[..., Output]


def text_of(one: Ran) -> np.ndarray:
    return one.given["encoder_hidden_states"]


def denoised(gpus: Gpus) -> list[Ran]:
    """The calls of denoisers so far."""
    return [one for one in gpus.ran if "out_sample" in one.outputs]


@pytest.mark.parametrize("placement", ["batched", "sequential", "parallel"])
def test_the_picture_is_that_of_the_cpu(painted: Painted, gpus: Gpus, placement: str) -> None:
    for pictures in (1, 2):
        expected = painted("onnxruntime:cpu", None, num_images_per_prompt=pictures)
        made = painted(placement=placement, num_images_per_prompt=pictures)
        np.testing.assert_allclose(np.stack(made.images), np.stack(expected.images), atol=1e-5)
        assert {row.placement for row in made.plan.ran} == {placement}
    assert {one.gpu for one in gpus.ran} == ({0, 1} if placement == "parallel" else {0})
    assert gpus.wrong == []


@pytest.mark.parametrize("steps", [2, 6], ids=["queued", "launched"])
def test_the_branch_without_the_prompt_has_the_second_gpu(painted: Painted, gpus: Gpus, steps: int) -> None:
    """From a denoiser's third row on, a branch's call is a graph that is launched."""
    painted(placement="batched")
    unconditional, conditional = text_of(denoised(gpus)[0])
    gpus.ran.clear()
    out = painted(placement="parallel", steps={"unet": steps, "unet_small": steps})
    for one in denoised(gpus):
        np.testing.assert_array_equal(text_of(one), [unconditional if one.gpu else conditional])
    assert [sum(one.gpu == gpu for one in denoised(gpus)) for gpu in (0, 1)] == [2 * steps] * 2
    assert {one.gpu for one in gpus.ran if one not in denoised(gpus)} == {0}
    assert gpus.wrong == []
    on = out.timings.ran_on
    assert [[one.gpu for one in on[name]] for name in ("unet", "text_encoder", "vae_decoder")] == [[0, 1], [0], [0]]
    assert str(on["unet"][1]).endswith(" on GPU 1")


def test_rows_without_guidance_have_the_first_and_no_model_of_their_own(painted: Painted, gpus: Gpus) -> None:
    painted(placement="parallel", steps={"unet": 4}, guidance_interval=(0.0, 0.5))
    assert sorted(one.gpu for one in denoised(gpus)) == [0, 0, 0, 0, 1, 1]
    assert sorted(gpus.loaded) == [0, 0, 0, 1]


def test_controlnets_run_beside_the_branch_that_they_steer(gpus: Gpus, tmp_path: Path) -> None:
    write_tiny_control(tmp_path / "bundle", ["canny"])
    write_engines(tmp_path / "cache", tmp_path / "bundle", "sm89")
    asked = {**ASKED, "steps": {"unet": 2}, "control_image": {"canny": Image.new("RGB", (64, 64), "red")}}
    made = []
    for target, devices in (("onnxruntime:cpu", None), (TARGET, (0, 1))):
        with Pipeline.open(tmp_path / "bundle", target, cache=tmp_path / "cache", devices=devices) as pipe:
            made.append(pipe(**asked, placement="parallel", output_type="np"))
    np.testing.assert_allclose(made[1].images, made[0].images, atol=1e-5)
    assert [{one.gpu for one in made[1].timings.ran_on[name]} for name in ("controlnet_canny", "unet")] == [{0, 1}] * 2
    assert gpus.wrong == []


@pytest.mark.parametrize("before", [0, 1])
def test_the_callers_thread_keeps_its_gpu_and_all_memory_is_freed(painted: Painted, gpus: Gpus, before: int) -> None:
    gpus.current = before
    painted(placement="parallel")
    assert gpus.current == before
    # As by a garbage collection on a thread of another library's.
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    gc.collect()
    assert gpus.owned() == {SCRATCH_BYTES: 2}  # what a GPU's engines share is kept for the next ones
    assert gpus.wrong == []


def test_one_gpu_alone_leaves_the_others_untouched(painted: Painted, gpus: Gpus) -> None:
    expected = painted("onnxruntime:cpu", None)
    for placement in ("batched", "parallel"):
        np.testing.assert_allclose(painted(devices=(1,), placement=placement).images, expected.images, atol=1e-5)
    assert gpus.set_up == {1}
    assert gpus.wrong == []


def test_placements_on_one_gpu_share_an_engine(bundle: Path, cache: Path, gpus: Gpus) -> None:
    """Calls that meet on the GPU have scratch memory each, also where the engine was loaded for one at a time."""
    asked = {**ASKED, "steps": {"unet": 4}, "guidance_interval": (0.0, 0.5)}
    with Pipeline.open(bundle, TARGET, cache=cache) as pipe:
        pipe(**asked)
        assert [len(device.scratches) for device in cuda.devices()] == [1, 0]
        for placement in ("parallel", "auto", "sequential"):
            pipe(**asked, placement=placement)
    assert [len(device.scratches) for device in cuda.devices()] == [2, 0]
    assert gpus.loaded == [0] * 3  # the text encoder, the denoiser, the decoder
    assert gpus.wrong == []


@pytest.mark.parametrize(
    ("target", "devices", "error", "words"),
    [
        (TARGET, (0, 0), ArgumentError, r"devices: one device asked to be two, got \(0, 0\)"),
        (TARGET, (1, 2), TargetError, r"index of a GPU, got 2, expected 0\.\.1: there are 2 GPUs here"),
        (TARGET, (0, 1, 2), ArgumentError, r"devices: 3 GPUs, got .*expected one or two: guidance has two branches"),
        (TARGET, (), ArgumentError, "devices: 0 GPUs"),
        (TARGET, (0, -1), ArgumentError, "devices: index of a GPU"),
        (TARGET, (0, True), ArgumentError, "devices: index of a GPU"),
        (TARGET, 1, ArgumentError, r"devices: type, got 1, expected indices of GPUs such as \(0, 1\)"),
        (TARGET, "01", ArgumentError, "devices: type, got '01'"),
        ("onnxruntime:cpu", (0,), ArgumentError, r"devices: GPUs for a target that takes none, got 'onnxruntime:cpu'"),
        ("auto", (0, 1), ArgumentError, "devices: GPUs for a target that takes none"),
        ("onnxruntime:cuda", (1,), ArgumentError, "CUDA_VISIBLE_DEVICES chooses the GPU of ONNX Runtime"),
    ],
)
def test_devices_that_cannot_be_are_refused_when_the_pipeline_is_opened(
    bundle: Path, gpus: Gpus, target: str, devices: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Pipeline.open(bundle, target, devices=devices)
    assert gpus.set_up == set()


def test_with_one_gpu_there_is_no_second(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "sm89")
    with pytest.raises(TargetError, match=r"index of a GPU, got 1, expected 0: there is 1 GPU here\..*doctor"):
        Pipeline.open(bundle, TARGET, devices=(0, 1))


def test_gpus_of_two_architectures_want_engines_of_both(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = stand_in(monkeypatch, "sm89", "sm120")
    with pytest.raises(
        TargetError, match=r"architecture of GPU 1, got 'sm120', expected sm89\. Ask for .*:sm89\+sm120"
    ):
        Pipeline.open(bundle, TARGET, devices=(0, 1))
    with Pipeline.open(bundle, "tensorrt-rtx:sm89+sm120", cache=cache, devices=(0, 1)) as pipe:
        with pytest.raises(EngineError, match=r"unet on GPU 1: .*--target tensorrt-rtx:sm120:fp32 --component unet"):
            pipe.stream(**ASKED, placement="parallel")
        assert gpus.ran == []
        expected = pipe(**ASKED, output_type="np")  # batched, on the first one alone
        write_engines(cache, bundle, "sm120", "unet", "unet_small")
        made = pipe(**ASKED, placement="parallel", output_type="np")
    np.testing.assert_allclose(made.images, expected.images, atol=1e-5)
    keys = {one.gpu: one.engine for one in made.timings.ran_on["unet"]}
    assert keys.keys() == {0, 1}
    assert len(set(keys.values())) == 2
    assert gpus.wrong == []


def test_auto_measures_anew_with_a_second_gpu(painted: Painted, gpus: Gpus, cache: Path) -> None:
    painted(placement="auto", devices=None)
    assert {one.gpu for one in gpus.ran} == {0}
    for _ in range(2):
        painted(placement="auto")
    assert {one.gpu for one in gpus.ran} == {0, 1}
    kept = [json.loads(path.read_bytes())["ground"]["devices"] for path in (cache / "placements").iterdir()]
    assert sorted(kept) == [["0: Stand-in 0"], ["0: Stand-in 0", "1: Stand-in 1"]]
    assert gpus.wrong == []


def test_auto_tries_no_placement_that_the_second_gpu_lacks_engines_for(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = stand_in(monkeypatch, "sm89", "sm120")
    with Pipeline.open(bundle, "tensorrt-rtx:sm89+sm120", cache=cache, devices=(0, 1)) as pipe:
        assert pipe(**ASKED, placement="auto").plan.placement in ("batched", "sequential")
        assert {one.gpu for one in gpus.ran} == {0}
        write_engines(cache, bundle, "sm120", "unet", "unet_small")
        with pytest.raises(EngineError, match=r"unet on GPU 1: no engine that can be refitted.*sm120.* --refit`"):
            pipe._models.require_engine("unet", PLAIN, (1, 4, 8, 8), refit=True, device=1)
        pipe(**ASKED, placement="auto")
    assert {one.gpu for one in gpus.ran} == {0, 1}
    assert gpus.wrong == []


def test_the_command_line_takes_devices(
    bundle: Path, cache: Path, gpus: Gpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", str(bundle), "--prompt", "red", "--steps", "2", "--seed", "7", "--cache", str(cache)]
    given += ["--target", TARGET, "--placement", "parallel", "--output-dir", str(tmp_path / "out")]
    assert main([*given, "--devices", "0,1", "--print-plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["devices"]
    assert told == {"gpus": ["0: Stand-in 0", "1: Stand-in 1"], "direct_copies": True}
    for peers, devices, words in (
        (True, "0,1", "GPU 0: Stand-in 0 and GPU 1: Stand-in 1, which copy to each other directly: asked for"),
        (False, "1,0", "Stand-in 0, which copy to each other through the host's memory: asked for"),
        (False, "1", f"target {TARGET}, GPU 1: Stand-in 1: asked for"),
    ):
        gpus.peers = peers
        assert main([*given, "--devices", devices, "--print-plan"]) == 0
        assert words in capsys.readouterr().out
    painted = [*given, "--prompt", "blue", "--json", "--force", "--devices"]
    for peers, devices, ran in ((True, "0,1", [0, 1]), (False, "0,1", [0, 1]), (False, "1", [1])):
        gpus.peers = peers
        assert main([*painted, devices]) == 0
        printed = capsys.readouterr()
        told, direct = json.loads(printed.out), peers if "," in devices else None
        assert told["devices"]["direct_copies"] is direct
        assert [[one["gpu"] for one in image["ran_on"]["unet"]] for image in told["images"]] == [ran] * 2
        assert printed.err.count("copy to each other through the host's memory") == (direct is False)
    for devices, words in (("0,0", "one device asked to be two"), ("a", "not a list of GPUs"), ("0,7", "got 7")):
        assert main([*given, "--devices", devices, "--force"]) in (1, 2)
        assert words in " ".join(capsys.readouterr().err.split())
    assert gpus.wrong == []


def test_doctor_lists_the_gpus_by_their_indices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = stand_in(monkeypatch, "sm89", "sm120")
    assert main(["doctor", "--json"]) == 0
    backends = {backend["backend"]: backend for backend in json.loads(capsys.readouterr().out)["backends"]}
    told = backends["tensorrt-rtx"]
    assert told["devices"] == ["GPU 0: Stand-in 0 (sm89)", "GPU 1: Stand-in 1 (sm120)"]
    assert told["targets"] == ["tensorrt-rtx:sm89", "tensorrt-rtx:sm120"]
    assert gpus.set_up == set()


def test_a_failed_copy_gives_the_thread_its_gpu_back(gpus: Gpus) -> None:
    first, second = cuda.devices()
    stream = cuda.Stream(first)
    second.runtime.cudaStreamSynchronize = lambda _: (700,)
    other = cuda.Stream(second)
    for waiting in (other, stream):
        with pytest.raises(ExecutionError, match=r"cudaStreamSynchronize failed \(error 700\)"):
            waiting.wait()
        assert gpus.current == 0


def test_what_is_freed_or_let_go_of_on_the_wrong_gpu_is_noticed(gpus: Gpus, cache: Path) -> None:
    """The stand-ins themselves."""
    first, second = cuda.devices()
    host, memory, stream = cuda.pinned(first, (4,), np.float32), cuda.Memory(first, 16), cuda.Stream(first)
    address = memory.address
    graph = stream.recorded(lambda: stream.upload(host, address))
    del memory
    assert not gpus.holds(address)
    for touch in (lambda: first.call("cudaFree", address), lambda: stream.upload(host, address)):
        with pytest.raises(AssertionError, match="was freed"):
            touch()
    graph.launch(stream)
    with pytest.raises(AssertionError, match="HostToDevice of what is not there"):
        stream.wait()
    assert len(gpus.wrong) == 3
    with second.current():
        second.runtime.cudaStreamSynchronize(stream.handle)
        engine = gpus.flavour.Runtime(None).deserialize_cuda_engine(
            next(cache.glob("engines/*/model.engine")).read_bytes()
        )
        context = engine.create_execution_context(None)
    del context, engine
    assert [words.partition(" of GPU")[0] for words in gpus.wrong[3:]] == [
        "StreamSynchronize", "a context is destroyed", "an engine is destroyed",
    ]  # fmt: skip


def test_what_is_queued_is_done_when_its_stream_is_waited_for(gpus: Gpus) -> None:
    """The stand-ins themselves."""
    first, _ = cuda.devices()
    host, memory = cuda.pinned(first, (4,), np.float32), cuda.Memory(first, 16)
    there, other = cuda.Stream(first), cuda.Stream(first)
    there.upload(host, memory.address)
    host[...] = 1  # too early
    there.wait()
    host[...] = 2
    there.upload(host, memory.address)
    for waited in (other, there):
        waited.wait()
        back = cuda.pinned(first, (4,), np.float32)
        other.download(memory.address, back)
        other.wait()
        np.testing.assert_array_equal(back, 1 if waited is other else 2)
    assert gpus.wrong == []
    other.download(memory.address, back)
    del waited, other
    gc.collect()
    assert gpus.wrong == ["StreamDestroy of what nobody waited for"]


@pytest.mark.parametrize(("peers", "enabled"), [(True, False), (True, True), (False, False)])
def test_memory_is_copied_between_gpus_directly_where_that_can_be(gpus: Gpus, peers: bool, enabled: bool) -> None:
    """enabled: by another library of the process."""
    gpus.peers, gpus.current = peers, 1
    first, second = cuda.devices()
    if enabled:
        assert second.runtime.cudaDeviceEnablePeerAccess(0, 0) == (0,)
    gpus.current = 0
    host = cuda.pinned(first, (4,), np.float32)
    host[...] = [1, 2, 3, 4]
    source, target = cuda.Memory(first, host.nbytes), cuda.Memory(second, host.nbytes)
    there, here = cuda.Stream(second), cuda.Stream(first)
    here.upload(host, source.address)
    here.wait()
    for _ in range(2):
        there.take(source, target)
    back = cuda.pinned(second, (4,), np.float32)
    there.download(target.address, back)
    there.wait()
    np.testing.assert_array_equal(back, host)
    assert gpus.copied["direct" if peers else "staged"] == 2 * host.nbytes
    here.take(source, source)
    here.wait()
    assert gpus.copied["DeviceToDevice"] == host.nbytes
    assert gpus.current == 0
    assert gpus.wrong == []


def test_direct_copies_that_are_refused_are_an_error(gpus: Gpus) -> None:
    first, second = cuda.devices()
    first.runtime.cudaDeviceEnablePeerAccess = lambda *_: (711,)
    with pytest.raises(ExecutionError, match=r"cudaDeviceEnablePeerAccess failed \(error 711\)"):
        second.reach(first)
