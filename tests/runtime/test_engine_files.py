"""Finding an engine: which of several fits, and what is said when one that is there does not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandemrt.runtime import engine_search
from tandemrt.runtime.build_commands import build_command, call_profile, rebuild_command
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import cache_folder, engines_folder
from tandemrt.runtime.engine_files import (
    FORMAT,
    RECIPES,
    REFIT,
    SIDECAR_NAME,
    VERSION_COMPATIBLE,
    Engine,
    Ingredients,
    InputRange,
    cached_engines,
    check_engine_files,
    origin_of,
    read_sidecar,
    weights_of,
)
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.errors import EngineError, UntrustedError
from tandemrt.runtime.files import file_sha256
from tandemrt.runtime.manifest import FileRecord
from tandemrt.runtime.ran_on import with_remedies
from tandemrt.runtime.targets import Target
from tandemrt.runtime.variant import PLAIN, UPDATE, Variant

from .tiny_bundle import write_tiny_bundle

HERE = "linux-test cpu"
SHAPES = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 12, 8)}
OPENVINO = Target("openvino", "cpu")
Add = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    write_tiny_bundle(folder)
    return Bundle.open(folder)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_search, "installed_version", lambda backend: "2026.4.1")
    monkeypatch.setattr(engine_search, "architecture_of", lambda target: HERE)


def ranges(low: int, high: int) -> dict[str, InputRange]:
    return {
        "sample": InputRange(min=(1, 4, low, low), opt=(2, 4, high, high), max=(2, 4, high, high)),
        "timestep": InputRange(min=(1,), opt=(1,), max=(1,)),
        "encoder_hidden_states": InputRange(min=(1, 12, 8), opt=(2, 12, 8), max=(2, 12, 8)),
    }


@pytest.fixture
def add(bundle: Bundle, tmp_path: Path) -> Add:
    """Put an engine of `unet` into the cache, of a few bytes; returns its folder."""

    def add(*profiles: dict[str, InputRange], **facts: Any) -> Path:
        made_of = Ingredients(
            **{
                "graph": origin_of(bundle, "unet"),
                "origin": origin_of(bundle, "unet"),
                "weights": weights_of(bundle, "unet"),
                "profiles": profiles or (ranges(8, 8),),
                "backend": "openvino",
                "backend_version": "2026.4.1",
                "device": "cpu",
                "architecture": HERE,
                "precision": "fp32",
                "flags": {},
                "recipe": RECIPES[facts.get("backend", "openvino")],
                **facts,
            }
        )
        folder = engines_folder(tmp_path) / made_of.key
        folder.mkdir(parents=True)
        (folder / "engine.blob").write_bytes(b"compiled")
        engine = Engine(
            format=FORMAT,
            component="unet",
            ingredients=made_of,
            files={"engine.blob": FileRecord(size=8, sha256=file_sha256(folder / "engine.blob"))},
            inputs=bundle.component("unet").inputs,
            outputs=bundle.component("unet").outputs,
            profile_names=("64x64",),
            build_s=1.0,
            peak_memory_bytes=1,
            versions={},
        )
        (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(engine))
        return folder

    return add


def test_the_narrowest_profile_that_serves_the_call_is_taken(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    wide = add(ranges(4, 32))
    both = add(ranges(4, 16), ranges(8, 8))
    found = fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)[0]
    assert (found.folder, found.profile) == (both, 1)
    odd, large = ({**SHAPES, "sample": (1, 4, side, side)} for side in (9, 32))
    assert fitting_engines(bundle, "unet", OPENVINO, odd, cache=tmp_path)[0].profile == 0
    assert fitting_engines(bundle, "unet", OPENVINO, large, cache=tmp_path)[0].folder == wide


def test_without_an_engine_the_command_is_said(bundle: Bundle, tmp_path: Path) -> None:
    expected = rf"there is no engine for openvino:cpu:fp32 .*Run `tandemrt build-engine {bundle.path} --target openv"
    with pytest.raises(EngineError, match=expected):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"backend_version": "2026.3.0"}, r"is of openvino 2026\.3\.0, here is 2026\.4\.1"),
        ({"architecture": "linux-other"}, r"is for linux-other"),
        ({"precision": "bf16"}, r"computes in bf16, not fp32"),
        ({"weights": {}}, r"was built from other weights"),
        ({"device": "gpu"}, r"is for gpu, not cpu"),
        ({"recipe": 1}, r"was built by another version of tandemrt, in another way"),
    ],
)
def test_an_engine_that_does_not_fit_is_diagnosed(
    facts: dict[str, Any], reason: str, bundle: Bundle, add: Add, tmp_path: Path
) -> None:
    folder = add(**facts)
    with pytest.raises(EngineError, match=rf"no engine for openvino:cpu:fp32 fits: {folder.name[:12]} {reason}"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


def test_a_call_outside_every_profile_is_diagnosed(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    add(ranges(8, 16))
    outside = r"sample \(2, 4, 32, 32\) is outside \(1\.\.2, 4, 8\.\.16, 8\.\.16\).*"
    outside += r"--component unet --profile 256x256:b1 --cache"
    with pytest.raises(EngineError, match=outside):
        fitting_engines(bundle, "unet", OPENVINO, {**SHAPES, "sample": (2, 4, 32, 32)}, cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "shapes", "variant", "expected"),
    [
        ("unet", {"sample": (2, 4, 8, 12)}, PLAIN, "W12xH8:b1"),
        ("unet", {"sample": (6, 4, 8, 8)}, PLAIN, "W8xH8:b3"),
        ("unet", {"sample": (3, 4, 8, 8)}, PLAIN, "W8xH8:b3"),
        ("unet", {"noise": (2, 4, 8, 8)}, Variant(step="unguided"), "W8xH8:b2:unguided"),
        ("unet", {"noise": (2, 4, 8, 8)}, Variant(step="update"), "W8xH8:b2"),
        ("vae_decoder", {"latent_sample": (1, 4, 8, 8)}, PLAIN, "W8xH8:b1"),
        ("text_encoder", {"noise": (2, 4, 8, 8)}, Variant(lora_slots=1, lora_rank=4), None),
    ],
)
def test_the_profile_that_takes_a_call_is_told_in_pixels(
    name: str, shapes: dict[str, tuple[int, ...]], variant: Variant, expected: str | None, bundle: Bundle
) -> None:
    scale = bundle.manifest.latent.downsampling
    in_pixels = expected and re.sub(r"[WH](\d+)", lambda side: str(int(side[1]) * scale), expected)
    assert call_profile(bundle, name, variant, shapes) == in_pixels
    command = build_command(bundle, name, OPENVINO, variant, shapes)
    assert command.endswith(f"--component {name}{variant.options}" + (f" --profile {in_pixels}" if in_pixels else ""))


def test_engines_of_other_graphs_and_backends_are_passed_over(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    add(origin="0" * 64)
    add(backend="tensorrt-rtx")
    add(variant=Variant(step="guided"))
    with pytest.raises(EngineError, match="there is no engine"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)
    assert fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path, variant=Variant(step="guided"))[0]


STEP = Variant(step="guided", timesteps=(999.0,))
SLOTS = Variant(lora_slots=1, lora_rank=8)


@pytest.mark.parametrize(
    ("there", "wanted", "serves"),
    [
        (PLAIN, PLAIN, True),
        (SLOTS, PLAIN, False),  # slots cost something
        (PLAIN, SLOTS, False),
        (Variant(lora_slots=2, lora_rank=16), SLOTS, True),
        (Variant(lora_slots=2, lora_rank=4), SLOTS, False),
        (Variant(step="guided", timesteps=(999.0, 500.0, 1.0)), STEP, True),
        (Variant(step="guided", timesteps=(500.0,)), STEP, False),
        (Variant(step="guided"), STEP, True),
        (Variant(step="unguided"), STEP, False),
        (PLAIN, STEP, False),
    ],
)
def test_which_variants_serve(there: Variant, wanted: Variant, serves: bool) -> None:
    assert there.serves(wanted) is serves


def test_of_variants_that_serve_the_cheapest_is_taken(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    add(variant=Variant(lora_slots=2, lora_rank=16))
    cheapest = add(variant=Variant(lora_slots=1, lora_rank=16))
    add(variant=Variant(lora_slots=4, lora_rank=16))
    assert fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path, variant=SLOTS)[0].folder == cheapest


def test_slots_that_are_too_small_are_told(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    add()
    folder = add(variant=Variant(lora_slots=2, lora_rank=4))
    told = f"fits: {folder.name[:12]} has 2 LoRA slots of rank 4, which are too few or too small"
    with pytest.raises(EngineError, match=told):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path, variant=SLOTS)


def test_a_variant_that_is_not_there_comes_with_its_command(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"\(1 LoRA slot of rank 8\).* --lora-rank 8"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path, variant=SLOTS)


@pytest.mark.parametrize(
    ("built_for", "here", "fits"),
    [
        ("sm89+sm120", "sm89", True), ("sm89+sm120", "sm86", False), ("portable", "sm86", True),
        ("portable", "sm75", False), ("sm89", "sm89+sm120", False),
    ],
)  # fmt: skip
def test_an_engine_runs_on_the_architectures_it_was_built_for(
    built_for: str, here: str, fits: bool, bundle: Bundle, add: Add, tmp_path: Path
) -> None:
    add(backend="tensorrt-rtx", device=built_for)
    target = Target("tensorrt-rtx", here)
    if fits:
        assert fitting_engines(bundle, "unet", target, SHAPES, cache=tmp_path)[0]
    else:
        with pytest.raises(EngineError, match=f"is for {built_for}, not {here}".replace("+", r"\+")):
            fitting_engines(bundle, "unet", target, SHAPES, cache=tmp_path)


@pytest.mark.parametrize("content", [b"compile", b"compilee"])
def test_a_damaged_file_is_found_before_it_is_loaded(content: bytes, bundle: Bundle, add: Add, tmp_path: Path) -> None:
    (add() / "engine.blob").write_bytes(content)
    (found,) = fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)
    with pytest.raises(EngineError, match=r"engine\.blob: (size|sha256), got .*Build the engine again"):
        check_engine_files(found.folder, found.engine)


def test_a_linked_file_is_refused(add: Add, tmp_path: Path) -> None:
    folder = add()
    (folder / "engine.blob").rename(tmp_path / "elsewhere")
    (folder / "engine.blob").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="not a regular file"):
        check_engine_files(folder, read_sidecar(folder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'{"format":2', b'{"format":1', "format of the engine, got 1, expected 2"),
        (b'"engine.blob":', b'"../escape":', "names of files, got '../escape'"),
        (
            b'"files":{"engine.blob":',
            b'"files":{"other":{"size":1,"sha256":"' + b"0" * 64 + b'"},"engine.blob":',
            r"files, got \['engine\.blob', 'other'\]",
        ),
        (b'"backend":"openvino"', b'"backend":"onnxruntime"', "files, got .* expected model.onnx"),
        (b'"max":[1]', b'"max":[1,1]', "no rising sizes"),
        (b'"min":[1]', b'"min":[2]', "no rising sizes"),
        (f'"recipe":{RECIPES["openvino"]}'.encode(), b'"recipe":0', "key, got"),
        (b"{", b"", "not an engine's sidecar"),
    ],
)
def test_a_strange_sidecar_is_refused(old: bytes, new: bytes, message: str, add: Add, tmp_path: Path) -> None:
    folder = add()
    raw = (folder / SIDECAR_NAME).read_bytes()
    assert old in raw
    (folder / SIDECAR_NAME).write_bytes(raw.replace(old, new, 1))
    with pytest.raises(EngineError, match=message):
        read_sidecar(folder)
    ((place, error),) = cached_engines(tmp_path)
    assert place == folder
    assert isinstance(error, EngineError)


def test_a_cache_that_everybody_may_write_to_is_not_read(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    add()
    engines_folder(tmp_path).chmod(0o777)
    with pytest.raises(EngineError, match=r"can be written by everybody.*chmod o-w"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


def test_a_cache_of_another_user_is_not_read(
    bundle: Bundle, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(EngineError, match=r"belongs to another user.*\$TANDEMRT_CACHE"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


def test_a_cache_that_another_group_may_write_to_is_not_read(
    bundle: Bundle, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add()
    engines_folder(tmp_path).chmod(0o775)
    assert fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)[0]
    monkeypatch.setattr(os, "getegid", lambda: 12345)
    with pytest.raises(EngineError, match=r"can be written by a group that is not yours.*chmod g-w"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


def test_an_engine_that_others_may_write_to_is_not_run(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    folder = add()
    folder.chmod(0o777)
    told = (
        rf"no engine .* fits: {folder}: can be written by everybody.*Check what is in it, then `chmod o-w {folder}`\.$"
    )
    with pytest.raises(UntrustedError, match=told):  # which no build helps against
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


def test_beside_an_engine_that_cannot_be_read_one_of_another_precision_is_not_spoken_of(
    bundle: Bundle, add: Add, tmp_path: Path
) -> None:
    add(precision="bf16")
    folder = add()
    (folder / SIDECAR_NAME).write_bytes(b"")
    with pytest.raises(EngineError, match=rf"no engine for openvino:cpu:fp32 fits: {folder}/{SIDECAR_NAME}: not an"):
        fitting_engines(bundle, "unet", OPENVINO, SHAPES, cache=tmp_path)


def test_an_engine_of_another_user_is_not_run(
    bundle: Bundle, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, euid = add(), os.geteuid()
    asked = iter([euid, 12345])
    monkeypatch.setattr(os, "geteuid", lambda: next(asked, euid))
    ((place, error),) = cached_engines(tmp_path)
    assert place == folder
    assert "belongs to another user" in str(error)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TANDEMRT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "tandemrt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/tandemrt")
    monkeypatch.setenv("TANDEMRT_CACHE", "/own")
    assert cache_folder() == Path("/own")
    assert cache_folder("/given") == Path("/given")


def test_a_remedy_is_told_once_for_all_that_it_helps_against() -> None:
    assert with_remedies({}) == ()
    told = with_remedies({"a: size": "Run `x`.", "b: size": "Run `x`.", "c is of another": "", "d: size": "Run `y`."})
    assert told == ("a: size", "b: size. Run `x`.", "c is of another", "d: size. Run `y`.")


def test_an_engine_is_built_again_as_it_was_made(bundle: Bundle, add: Add, tmp_path: Path) -> None:
    folded = Variant(step="guided", timesteps=(999.0, 500.0))
    engine = read_sidecar(add(variant=folded, flags={REFIT: True, VERSION_COMPATIBLE: True}))
    command = rebuild_command(bundle, "unet", OPENVINO, engine, {"noise": (1, 4, 8, 8)}, tmp_path)
    size = 8 * bundle.manifest.latent.downsampling
    told = f" --step --fold-steps 2 --profile {size}x{size}:b1:guided --cache {tmp_path} --refit --version-compatible"
    assert command.endswith(told)
    engine = read_sidecar(add(variant=UPDATE))
    command = rebuild_command(bundle, "unet", OPENVINO, engine, {"noise": (1, 4, 8, 8)}, tmp_path)
    assert command.endswith(f" --component unet --profile {size}x{size}:b1 --cache {tmp_path}")
