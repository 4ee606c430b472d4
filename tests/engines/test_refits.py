"""LoRAs in the weights of engines: they come, mix and go, one set at a time, and paint what slots paint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tandemrt.engines import flavour
from tandemrt.engines.composed import composed
from tandemrt.engines.flavour import Options
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.runtime import Pipeline, engine_session, targets, turns
from tandemrt.runtime.backends.modules import imported
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_search import Found
from tandemrt.runtime.errors import ArgumentError, BundleError, CancelledError, EngineError, ExecutionError
from tandemrt.runtime.onnx_files import own_projections, projections
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import Variant

from ..runtime.lora_writing import write_lora
from ..runtime.test_concurrency import at_once
from .refitting import TARGET, Refitter, StandIn, put
from .test_loras import TOLERANCE, distance

RANK = 2
PLAIN = ("text_encoder", "unet", "unet_small", "vae_decoder", "vae_decoder_tiny")
REQUEST: Mapping[str, Any] = {
    "prompt": "red blue",
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "seed": 7,
    "output_type": "latent",
    "placement": "batched",
}
REFIT = Options(refit=True)
Latents = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def gpu(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, as far as anyone asks: its engines are stand-ins."""

    def opened(found: Found, *_: Any, **__: Any) -> StandIn:
        return StandIn(tiny, found, tmp_path / "graphs")

    monkeypatch.setattr(engine_session, "open_engine", opened)
    for module in (targets, flavour):
        monkeypatch.setattr(module, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(engine_session, "target_here", lambda target: target)
    monkeypatch.setattr(StandIn, "refits", 0)
    yield
    Refitter.fails = ""


@pytest.fixture
def cache(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of engines that can be refitted, and of the others that a generation needs."""
    monkeypatch.setenv("TANDEMRT_CACHE", str(tmp_path / "cache"))
    put(tiny, tmp_path / "cache", *PLAIN, options=REFIT)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def loras(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One LoRA for the large denoiser and the text encoder, one for the denoiser alone."""
    folder = tmp_path_factory.mktemp("loras")
    unet, text = (projections(tiny_path / name / "model.onnx") for name in ("unet", "text_encoder"))
    return (
        write_lora(folder / "both.safetensors", {"unet": unet, "text_encoder": text}, rank=RANK, seed=1, size=0.4),
        write_lora(folder / "unet.safetensors", {"unet": unet}, rank=1, seed=2, layout="diffusers", size=0.4),
    )


@pytest.fixture
def sets(loras: tuple[Path, Path]) -> list[dict[Path, float]]:
    """From the base to A, to B, to both, back, and to A with another scale."""
    a, b = loras
    return [{}, {a: 0.8}, {b: 0.5}, {a: 0.8, b: 0.5}, {}, {a: -0.5}]


def variants(output: Any, name: str = "unet") -> list[str]:
    return [one.variant for one in output.timings.ran_on[name]]


@pytest.mark.parametrize("step", [False, True])
def test_a_walk_over_loras_paints_what_slots_paint(
    tiny: Bundle, cache: Path, tmp_path: Path, sets: list[dict[Path, float]], step: bool
) -> None:
    slots = tmp_path / "slots"
    put(tiny, slots, *PLAIN)
    put(tiny, slots, "unet", "text_encoder", lora_slots=2, lora_rank=RANK)
    if step:
        put(tiny, cache, "unet", options=REFIT, step=True)
    with Pipeline.open(tiny.path, TARGET, cache=slots) as pipe:
        expected = [pipe(**REQUEST, loras=wanted) for wanted in sets]
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        walk = [pipe(**REQUEST, loras=wanted) for wanted in sets]
        again = pipe(**REQUEST, loras=sets[1])
        silent = pipe(**REQUEST, loras=dict.fromkeys(sets[3], 0.0))
    for made, slotted in zip(walk, expected, strict=True):
        assert distance(made, slotted) <= TOLERANCE
        assert made.loras == slotted.loras
        assert made.timings.step_engines == step
    for one, other in ((walk[4], walk[0]), (silent, walk[0]), (again, walk[1])):
        np.testing.assert_array_equal(one.latents, other.latents)
    for index in (1, 2, 3, 5):
        assert all(distance(walk[index], walk[other]) > 0.01 for other in (0, 1, 2, 3, 5) if other != index)
    assert variants(walk[0]) == (["guided step"] if step else ["plain"])
    assert variants(walk[1]) == (["guided step, refitted"] if step else ["refitted"])
    assert variants(walk[1], "text_encoder") == ["refitted"]
    assert variants(walk[2], "text_encoder") == ["plain"]
    assert variants(expected[1]) == [f"2 LoRA slots of rank {RANK}"]


def test_slots_come_first_where_they_fit_the_pictures_size(tiny: Bundle, cache: Path, loras: tuple[Path, Path]) -> None:
    put(tiny, cache, *PLAIN, profile="96x96:b1", options=REFIT)
    put(tiny, cache, "unet", profile="96x96:b1", lora_slots=1, lora_rank=RANK)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        small, large = (pipe(**REQUEST, loras={loras[1]: 0.5}, height=side, width=side) for side in (64, 96))
    assert (variants(small), variants(large)) == (["refitted"], [f"1 LoRA slot of rank {RANK}"])


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5)], ids=["guided", "both kinds"])
def test_step_engines_with_slots_come_first_where_they_have_all_kinds_of_rows(
    tiny: Bundle, cache: Path, loras: tuple[Path, Path], interval: tuple[float, float]
) -> None:
    put(tiny, cache, "unet", profile="64x64:b1:guided", lora_slots=1, lora_rank=RANK, step=True)
    request = {**REQUEST, "loras": {loras[1]: 0.5}, "guidance_interval": interval}
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        made = pipe(**request)
    slots = f"1 LoRA slot of rank {RANK}, "
    assert variants(made) == (["refitted"] if interval[1] < 1 else [f"{slots}guided step"])
    put(tiny, cache, "unet", profile="64x64:b1:unguided", lora_slots=1, lora_rank=RANK, step=True)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        made = pipe(**request)
    assert variants(made)[0] == f"{slots}guided step"
    assert variants(made)[1:] == ([f"{slots}unguided step"] if interval[1] < 1 else [])


def test_step_engines_with_slots_are_of_no_use_where_another_denoiser_lacks_its_own(
    tiny: Bundle, cache: Path, loras: tuple[Path, Path]
) -> None:
    put(tiny, cache, "unet", profile="64x64:b1:guided", lora_slots=1, lora_rank=RANK, step=True)
    steps = {"unet": 2, "unet_small": 1}
    request = {**REQUEST, "loras": {loras[1]: 0.5}, "num_inference_steps": None, "steps": steps}
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        assert variants(pipe(**request)) == ["refitted"]
    put(tiny, cache, "unet_small", profile="64x64:b1:guided", step=True)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        assert variants(pipe(**request)) == [f"1 LoRA slot of rank {RANK}, guided step"]


def test_each_component_takes_its_loras_as_its_engines_do(
    tiny: Bundle, cache: Path, sets: list[dict[Path, float]]
) -> None:
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        expected = pipe(**REQUEST, loras=sets[1])
    put(tiny, cache, "text_encoder", lora_slots=1, lora_rank=RANK)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        mixed = pipe(**REQUEST, loras=sets[1])
    assert distance(mixed, expected) <= TOLERANCE
    assert (variants(mixed, "text_encoder"), variants(mixed)) == ([f"1 LoRA slot of rank {RANK}"], ["refitted"])


def test_engines_that_do_not_take_loras_are_told_with_both_commands(
    tiny: Bundle, cache: Path, tmp_path: Path, loras: tuple[Path, Path]
) -> None:
    plain, wanted = tmp_path / "plain", {loras[1]: 0.5}
    put(tiny, plain, *PLAIN)
    both = (
        r"there is no engine for tensorrt-rtx:sm89:fp32 \(1 LoRA slot of rank 1\) .* "
        r"Run `tandemrt build-engine \S+ --target tensorrt-rtx:sm89:fp32 --component unet --lora-slots 1 --lora-rank 1 "
        r"--profile 64x64:b1 --cache \S+`, or `tandemrt build-engine \S+ --target tensorrt-rtx:sm89:fp32 "
        r"--component unet --profile 64x64:b1 --cache \S+ --refit` for an engine that holds one set of LoRAs at a time"
    )
    with Pipeline.open(tiny.path, TARGET, cache=plain) as pipe, pytest.raises(EngineError, match=both):
        pipe(**REQUEST, loras=wanted)
    with (
        Pipeline.open(tiny.path, TARGET, cache=cache) as pipe,
        pytest.raises(
            EngineError, match=r"unet: no engine .*no profile for this call.*128x128:b1 --cache \S+ --refit`"
        ),
    ):
        pipe(**REQUEST, loras=wanted, height=128, width=128)


def test_a_plain_engine_that_fits_better_does_not_get_the_loras(
    tiny: Bundle, cache: Path, loras: tuple[Path, Path]
) -> None:
    put(tiny, cache, *PLAIN)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        base, changed = pipe(**REQUEST), pipe(**REQUEST, loras={loras[1]: 0.5})
    assert (variants(base), variants(changed)) == (["plain"], ["refitted"])
    assert base.timings.ran_on["unet"][0].engine != changed.timings.ran_on["unet"][0].engine
    assert distance(changed, base) > 0.01


def test_after_a_refit_that_failed_the_weights_are_made_anew(
    tiny: Bundle, cache: Path, sets: list[dict[Path, float]]
) -> None:
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        expected = [pipe(**REQUEST, loras=wanted) for wanted in sets]
    weight = own_projections(tiny.model_path("unet"))["conv_6"].weight
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        for at in (2, 2, 0, 0, 3):
            Refitter.fails = weight
            with pytest.raises(ExecutionError, match=r"TensorRT failed: .*it was told to"):
                pipe(**REQUEST, loras=sets[1])
            Refitter.fails = ""
            np.testing.assert_array_equal(pipe(**REQUEST, loras=sets[at]).latents, expected[at].latents)


@pytest.mark.parametrize("step", [False, True])
def test_a_refit_that_fails_is_told_and_costs_the_engine_nothing(
    tiny: Bundle, cache: Path, loras: tuple[Path, Path], step: bool
) -> None:
    if step:
        put(tiny, cache, "unet", options=REFIT, step=True)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        expected = pipe(**REQUEST)
    Refitter.fails = own_projections(tiny.model_path("unet"))["conv_6"].weight
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        for _ in range(2):
            with pytest.raises(ExecutionError, match=r"^unet: TensorRT failed: it cannot be refitted"):
                pipe(**REQUEST, loras={loras[1]: 0.5})
        Refitter.fails = ""
        made = pipe(**REQUEST)
    np.testing.assert_array_equal(made.latents, expected.latents)
    assert made.timings.step_engines == step
    assert made.timings.ran_on["unet"] == expected.timings.ran_on["unet"]


def test_threads_with_other_loras_paint_what_serial_runs_paint(
    tiny: Bundle, cache: Path, sets: list[dict[Path, float]]
) -> None:
    jobs = [{**REQUEST, "seed": seed, "loras": wanted} for seed in (1, 2) for wanted in sets]
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        serial = [pipe(**job).latents for job in jobs]
        together = at_once([lambda job=job: pipe(**job).latents for job in jobs * 2])
        mapped = [output.latents for output in pipe.map(jobs)]
    for index, made in enumerate([*together, *mapped]):
        np.testing.assert_array_equal(made, serial[index % len(serial)])


def test_those_of_one_set_run_at_once(tiny: Bundle, cache: Path, sets: list[dict[Path, float]]) -> None:
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        one, other = (pipe.stream(**REQUEST, loras=sets[1]) for _ in range(2))
        next(one)
        before = StandIn.refits
        next(other)
        made = [stream.result().latents for stream in (one, other)]
        assert StandIn.refits == before
        np.testing.assert_array_equal(made[0], made[1])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_stream_that_is_put_aside_goes_on_with_its_own_loras(
    tiny: Bundle, cache: Path, sets: list[dict[Path, float]]
) -> None:
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        expected = [pipe(**REQUEST, loras=wanted).latents for wanted in sets]
        streams = [pipe.stream(**REQUEST, loras=wanted) for wanted in sets]
        for _ in range(2):
            for stream in streams:
                next(stream)
        for latents, output in zip(
            expected[1:3], pipe.map({**REQUEST, "loras": one} for one in sets[1:3]), strict=True
        ):
            np.testing.assert_array_equal(output.latents, latents)
        for latents, stream in zip(expected, streams, strict=True):
            np.testing.assert_array_equal(stream.result().latents, latents)


@pytest.mark.parametrize("let_go", ["closed", "collected", "cancelled"])
def test_a_stream_that_is_let_go_keeps_nobody_waiting(
    tiny: Bundle, cache: Path, sets: list[dict[Path, float]], let_go: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 60.0)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        expected = pipe(**REQUEST, loras=sets[2]).latents
        stream = pipe.stream(**REQUEST, loras=sets[1])
        next(stream)
        if let_go == "closed":
            stream._events.close()
        elif let_go == "cancelled":
            stream.cancel()
            with pytest.raises(CancelledError):
                stream.result()
        else:
            del stream
        np.testing.assert_array_equal(pipe(**REQUEST, loras=sets[2]).latents, expected)


@pytest.mark.parametrize("ended", ["cancelled", "closed"])
def test_one_that_waits_can_be_ended(
    tiny: Bundle, cache: Path, sets: list[dict[Path, float]], ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 60.0)
    with Pipeline.open(tiny.path, TARGET, cache=cache) as pipe:
        ahead = pipe.stream(**REQUEST, loras=sets[1])
        next(ahead)
        waiting = pipe.stream(**REQUEST, loras=sets[2])
        raised = list[BaseException]()

        def wait() -> None:
            with pytest.raises(CancelledError) as caught:
                waiting.result()
            raised.append(caught.value)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        if ended == "cancelled":
            waiting.cancel()
        else:
            pipe.close()
        thread.join(10)
        assert "waited" in str(raised[0]) or "closed" in str(raised[0])
        if ended == "cancelled":
            assert len(ahead.result().latents) == 1


def test_generate_reaches_it_without_a_further_option(
    tiny: Bundle, cache: Path, tmp_path: Path, loras: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tiny.path), "--prompt", "red", "--seed", "7", "--steps", "2", "--target", TARGET]
    assert main([*arguments, "--cache", str(cache), "--lora", f"{loras[1]}:0.5", "--output-dir", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert f"{loras[1]} changed unet\n" in told.out
    assert "(refitted)" in " ".join(told.err.split())


def test_inspect_shows_which_engines_can_be_refitted(
    tiny: Bundle, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tiny, cache, "unet")
    assert main(["inspect", str(tiny.path), "--engines"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["unet", f"{TARGET}:fp32"]]
    assert [" plain, refittable " in line for line in shown] == [False, True]


def test_what_cannot_be_refitted_is_refused_before_the_build(tiny: Bundle, tmp_path: Path) -> None:
    def refused(complaint: str, target: str = TARGET, **options: Any) -> None:
        with pytest.raises(ArgumentError, match=complaint):
            put(tiny, tmp_path, *options.pop("components", ("unet",)), target=target, options=REFIT, **options)

    refused(r"--refit: given together with --lora-slots\. Slots take LoRAs", lora_slots=1, lora_rank=1)
    refused(r"--refit: given together with --fold-steps\. Weights that LoRAs change", step=True, fold_steps=2)
    refused(r"--refit: given together with --stages\. Stages take no LoRAs", stages=2)
    refused(r"--refit: not for precision bf16\. Ask for fp16", target=f"{TARGET}:bf16")
    refused(r"--refit: nothing to make it of, got 'vae_decoder'", components=("vae_decoder",))


def test_projections_that_share_a_weight_are_refused(tiny: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load(tiny.model_path("unet"))
    onnx.save(model, path)
    assert own_projections(path).keys() == projections(path).keys()
    reading = next(node for node in model.graph.node if node.op_type == "MatMul")
    model.graph.node.add(op_type="Abs", input=[reading.input[1]], output=["seen"], name="seen")
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"projections that share, got \['matmul_1'\].*--lora-slots"):
        own_projections(path)


def test_only_what_loras_change_is_built_to_be_refitted(tiny: Bundle) -> None:
    plan = BuildPlan(tiny.path, (parse_target(TARGET),), Path("unused"), options=REFIT)
    made = [(request.component, request.ingredients) for request in requests_of(plan, tiny)]
    plain = [(name, Variant()) for name in ("text_encoder", "unet", "unet_small")]
    assert [(name, ingredients.variant) for name, ingredients in made if ingredients.flags] == plain


@pytest.mark.parametrize("variant", [Variant(), Variant(step="guided")], ids=str)
def test_tensorrt_knows_the_weights_by_the_bundles_names(
    exported: Callable[[str], Path], tmp_path: Path, variant: Variant
) -> None:
    """Its own parser of ONNX is asked, which needs no GPU."""
    path = exported("sd15")
    trt = imported("tensorrt-rtx")
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(composed(path, variant, "unet").SerializeToString())
    weights = [one.weight for one in own_projections(path).values()]
    assert len(weights) > 100
    assert all(network.mark_weights_refittable(weight) for weight in weights)
    assert not network.mark_weights_refittable("no such weight")
