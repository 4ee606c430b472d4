"""Generations that stop after a step and go on elsewhere: the bits of the whole, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemrt.runtime import Handover, Pipeline, RequestError
from tandemrt.runtime.messages import MAX_HEADER_BYTES, packed, unpacked
from tandemrt.runtime.solvers import SOLVERS

from .test_concurrency import FAMILIES, picture

MADE_OF = ("protocol", "plan", "bundle", "step", "seed", "models")
HYBRID: dict[str, Any] = {"prompt": "red", "steps": {"unet": 2, "unet_free": 3}, "seed": 7}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Pipeline]]:
    folder, pipes = tmp_path_factory.mktemp("families"), {}
    for family, (write, _) in FAMILIES.items():
        write(folder / family)
        pipes[family] = Pipeline.open(folder / family, threads=1)
    yield pipes
    for pipe in pipes.values():
        pipe.close()


@pytest.fixture(scope="module")
def made(families: Mapping[str, Pipeline]) -> Handover:
    return handed(families["steered"], HYBRID, 2)


def handed(pipe: Pipeline, job: Mapping[str, Any], until: int) -> Handover:
    output = pipe(**job, until=until)
    assert output.images == ()
    assert output.handover is not None
    return output.handover


def require_equal_parts(pipe: Pipeline, job: Mapping[str, Any]) -> None:
    """That of the job, handed over as bytes after each of its steps, both parts together are the whole's bits."""
    whole = pipe(**job, output_type="np")
    steps = int(whole.plan.table.steps[-1]) + 1
    for step in range(1, steps + 1):
        handover = Handover.from_bytes(handed(pipe, job, step).to_bytes())
        assert handover.step == step
        rest = pipe(**{**job, "seed": None}, start=handover, output_type="np")
        np.testing.assert_array_equal(rest.images, whole.images)
        assert (rest.seeds, len(rest.timings.rows)) == (whole.seeds, int((whole.plan.table.steps >= step).sum()))


@pytest.mark.parametrize(
    ("family", "index"), [(family, i) for family, (_, jobs) in FAMILIES.items() for i in range(len(jobs))]
)
def test_two_parts_are_the_whole_bit_for_bit(family: str, index: int, families: Mapping[str, Pipeline]) -> None:
    require_equal_parts(families[family], {"seed": 7, **FAMILIES[family][1][index]})


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "flow_euler"])
def test_a_state_holds_what_each_solver_keeps(solver: str, families: Mapping[str, Pipeline]) -> None:
    require_equal_parts(families["steered"], {**HYBRID, "solver": solver})


def test_further_ways_of_asking(families: Mapping[str, Pipeline]) -> None:
    pipe = families["steered"]
    two = {**HYBRID, "num_images_per_prompt": 2, "solver": "euler_a"}
    require_equal_parts(pipe, {**two, "seed": [7, 8]})
    require_equal_parts(pipe, {**two, "seed": [np.int64(7), np.int64(8)]})
    require_equal_parts(pipe, {**two, "seed": 7, "seed_device": "cuda"})
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8), np.float32)
    require_equal_parts(pipe, {**HYBRID, "latents": latents, "solver": "euler_a"})
    require_equal_parts(pipe, {**HYBRID, "placement": "sequential", "guidance_interval": (0.0, 0.5)})
    steered = {**HYBRID, "steps": {"unet": 4}, "control_image": {"canny": picture(1)}}
    require_equal_parts(pipe, {**steered, "control_guidance_start": 0.5})


def test_three_parts(families: Mapping[str, Pipeline]) -> None:
    pipe = families["steered"]
    first = handed(pipe, HYBRID, 1)
    second = handed(pipe, {**HYBRID, "start": first}, 4)
    rest = pipe(**HYBRID, start=second, output_type="np")
    np.testing.assert_array_equal(rest.images, pipe(**HYBRID, output_type="np").images)


def test_only_the_models_of_a_part_run(control_bundle: Path) -> None:
    with Pipeline.open(control_bundle, threads=1) as pipe:
        output = pipe(**HYBRID, until=2)
        assert set(output.timings.ran_on) == {"text_encoder", "unet"}
        assert [row.denoiser for row in output.timings.rows] == ["unet", "unet"]
        rest = pipe(**HYBRID, start=output.handover)
        assert set(rest.timings.ran_on) == {"text_encoder", "unet_free", "vae_decoder"}
        decoded = pipe(**HYBRID, start=handed(pipe, HYBRID, 5))
        assert set(decoded.timings.ran_on) == {"vae_decoder"}
        np.testing.assert_array_equal(decoded.latents, rest.latents)


def test_a_part_tells_its_rows_by_those_of_the_whole(families: Mapping[str, Pipeline], made: Handover) -> None:
    events = list(families["steered"].stream(**HYBRID, start=made, previews=2))
    assert [(event.row, event.rows, event.step) for event in events] == [(2, 5, 2), (3, 5, 3), (4, 5, 4)]
    assert [bool(event.preview) for event in events] == [False, True, False]


def test_another_copy_of_the_models_goes_on_with_it(
    tmp_path: Path, families: Mapping[str, Pipeline], made: Handover
) -> None:
    write, _ = FAMILIES["steered"]
    write(tmp_path / "copy")
    with Pipeline.open(tmp_path / "copy", threads=1) as copy:
        np.testing.assert_array_equal(copy(**HYBRID, start=made).latents, families["steered"](**HYBRID).latents)


def test_half_precision_halves_the_message_and_stays_close(families: Mapping[str, Pipeline], made: Handover) -> None:
    pipe = families["steered"]
    whole, half = made.to_bytes(), made.to_bytes("float16")
    assert len(whole) - len(half) == made.state.size * 2
    exact = pipe(**HYBRID).latents
    np.testing.assert_allclose(pipe(**HYBRID, start=Handover.from_bytes(half)).latents, exact, rtol=0.02, atol=0.02)


def test_every_flipped_bit_and_every_cut_is_refused(made: Handover) -> None:
    message = made.to_bytes()
    for index in range(len(message)):
        with pytest.raises(RequestError, match=r"^handover"):
            Handover.from_bytes(message[:index] + bytes([message[index] ^ (1 << index % 8)]) + message[index + 1 :])
        with pytest.raises(RequestError, match=r"^handover"):
            Handover.from_bytes(message[:index])
    with pytest.raises(RequestError, match=r"^handover: size"):
        Handover.from_bytes(message + b"\0")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_words(body: bytes) -> None:
    with pytest.raises(RequestError, match=r"^handover"):
        Handover.from_bytes(body)
    with pytest.raises(RequestError, match=r"^handover"):
        Handover.from_bytes(len(body).to_bytes(8, "little") + body)


def test_a_header_beyond_the_limit_is_not_read() -> None:
    with pytest.raises(
        RequestError, match=rf"header size, got {MAX_HEADER_BYTES + 1}, expected 2\.\.{MAX_HEADER_BYTES}"
    ):
        Handover.from_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1))


def with_state(handover: Handover, change: Callable[[np.ndarray], Any]) -> Handover:
    return Handover(change(handover.state.copy()), handover.step, handover.plan, handover.bundle, handover.seed)


@pytest.mark.parametrize(
    ("told", "given"),
    [
        (r"start: of another plan, got '\w{16}', expected \w{16}\. Ask for", {"guidance_scale": 3.0}),
        ("start: of another plan", {"steps": {"unet": 3, "unet_free": 2}}),
        ("start: of another plan", {"solver": "ddim"}),
        (r"start: shape, got \(\d, 1, 4, 8, 8\), expected \(\d, 1, 4, 12, 8\)", {"height": 96}),
        ("seed: not the hand-over's, got 8, expected 7", {"seed": 8}),
        ("until: not usable, got 1, expected a whole number in 2..5", {"until": 1}),
        ("until: not usable, got 6, expected a whole number in 2..5", {"until": 6}),
        ("until, start: adaptive guidance goes by what it saw", {"guidance": "adaptive"}),
        ("start: of another type, got 'dict', expected a Handover", {"start": {}}),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    told: str, given: Mapping[str, Any], families: Mapping[str, Pipeline], made: Handover
) -> None:
    with pytest.raises(RequestError, match=told):
        families["steered"](**{**HYBRID, "start": made, **given})


def test_values_that_cannot_be_used_are_refused(families: Mapping[str, Pipeline], made: Handover) -> None:
    def spoilt(state: np.ndarray) -> np.ndarray:
        state[0, 0, 0, 0, 0] = np.nan
        return state

    for seeds in ((), (7, 8)):
        other = Handover(made.state, made.step, made.plan, made.bundle, seeds)
        with pytest.raises(RequestError, match=rf"start: how many seeds it has, got {len(seeds)}, expected 1 or 1"):
            families["steered"](**{**HYBRID, "seed": None}, start=other)
    with pytest.raises(RequestError, match="start: holds NaN or Inf"):
        families["steered"](**HYBRID, start=with_state(made, spoilt))
    with pytest.raises(
        RequestError, match=r"handover: the state has values that float16 does not hold\. Hand it over in float32"
    ):
        with_state(made, lambda state: state * 1e6).to_bytes("float16")
    with pytest.raises(RequestError, match="dtype: unknown, got 'bfloat16', expected float32 or float16"):
        made.to_bytes("bfloat16")  # type: ignore[arg-type]


def test_which_models_ran_is_told_and_looked_at(families: Mapping[str, Pipeline], made: Handover) -> None:
    pipe = families["steered"]
    digest = pipe.bundle.manifest.model_digest("unet")
    assert made.models == Handover.from_bytes(made.to_bytes()).models == {"unet": digest}
    pipe(**HYBRID, start=replace(made, models={"unet": digest, "unet_elsewhere": "0" * 64}))
    with pytest.raises(
        RequestError, match=rf"start: its 'unet' is another model, got '0{{16}}', expected {digest[:16]}"
    ):
        pipe(**HYBRID, start=replace(made, models={"unet": "0" * 64}))
    for models in ({"unet": "abc"}, {"unet": 3}, {f"unet_{i}": digest for i in range(65)}):
        with pytest.raises(RequestError, match=r"handover: models, got .*, expected sha256 digests by denoiser"):
            Handover.from_bytes(replace(made, models=models).to_bytes())  # type: ignore[arg-type]
    for text in ("[]", "null", "{", "[" * 10_000):
        tensors, facts = unpacked("handover", made.to_bytes(), {"state": 5}, dict.fromkeys(MADE_OF, True))
        with pytest.raises(RequestError, match="handover: models, got"):
            Handover.from_bytes(packed(tensors, {**facts, "models": text}))
