"""What single files do not hold or say: where it comes from, and how it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tandemrt.export import bundle as bundles
from tandemrt.export import single_file
from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import ExportPlan
from tandemrt.export.presets import Model, read_preset
from tandemrt.export.random_checkpoint import build
from tandemrt.export.single_file import read_single_file
from tandemrt.export.sources import describe, read_sources
from tandemrt.export.verify import _as_exported
from tandemrt.export.weights import source_digest
from tandemrt.runtime.errors import ArgumentError, CheckpointError

from .original import State, original
from .single_files import FIRST_STAGE, UNET, parts, tokenizers, without, write

pytestmark = pytest.mark.usefixtures("small")


def test_tokenizers_are_asked_for_and_held_to_their_encoders(
    states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    path = write(tmp_path, original("sd15", states("sd15")))
    with pytest.raises(
        ArgumentError,
        match=r"--tokenizer: not given, and a single file holds none, expected a pipeline directory with tokenizer/ or "
        r"a tokenizer's own folder\. Download the tokenizer of stable-diffusion-v1-5/",
    ):
        read_single_file(path, None, None)
    with pytest.raises(ArgumentError, match=r"--tokenizer: no tokenizer here, got '.*nowhere'"):
        read_single_file(path, tmp_path / "nowhere", None)
    folder = tokenizers(tmp_path / "pipeline", "sd15")
    for given in (folder, folder / "tokenizer"):
        assert read_single_file(path, given, None).texts["text_encoder"].tokenizer == folder / "tokenizer"
    other = tokenizers(tmp_path / "other", "sd21")
    with pytest.raises(CheckpointError, match=r"pad_token: the tokenizer of another model than text_encoder, got '!'"):
        read_single_file(path, other, None)
    special = other / "tokenizer" / "special_tokens_map.json"
    special.write_text(json.dumps({"pad_token": {"content": "<|endoftext|>", "lstrip": False}}))
    assert read_single_file(path, other, None).texts["text_encoder"].tokenizer == other / "tokenizer"


def test_every_text_encoder_has_its_own_tokenizer(states: Callable[[str], dict[str, State]], tmp_path: Path) -> None:
    path, folder = write(tmp_path, original("sdxl", states("sdxl"))), tokenizers(tmp_path / "pipeline", "sdxl")
    texts = read_single_file(path, folder, None).texts
    assert [source.tokenizer.name for source in texts.values()] == ["tokenizer", "tokenizer_2"]
    with pytest.raises(ArgumentError, match=r"no tokenizer here, got '.*', expected .* tokenizer/, tokenizer_2/"):
        read_single_file(path, folder / "tokenizer", None)


def test_what_a_file_is_taken_for_is_said(
    states: Callable[[str], dict[str, State]], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = write(tmp_path, original("sdxl", states("sdxl"))), tokenizers(tmp_path / "pipeline", "sdxl")
    plan = ExportPlan(path, tmp_path / "out", tokenizer=folder)
    said = describe(plan)
    assert said["taken_for"] == "sdxl"
    assert "model.safetensors is taken for sdxl, with EulerDiscreteScheduler" in said["assumption"]
    assert "--solver, " in said["assumption"]
    heard: list[str] = []
    monkeypatch.setattr(bundles, "Staging", _Stop)
    with pytest.raises(InterruptedError):
        export_bundle(plan, lambda label, done, total: heard.append(label))
    assert heard == [said["assumption"]]
    directory = describe(ExportPlan(checkpoint, tmp_path / "out"))
    assert directory["taken_for"] is directory["assumption"] is None


class _Stop:
    """In the place of what an export writes to."""

    def __init__(self, *_: object, **__: object) -> None:
        raise InterruptedError


def test_a_directory_has_its_own_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--tokenizer: a diffusers directory has its own"):
        read_sources(ExportPlan(checkpoint, tmp_path / "out", tokenizer=checkpoint / "tokenizer"))


@pytest.mark.parametrize(
    ("preset", "missing", "option"),
    [
        ("sd15", "vae", "vae"),
        ("koala-700m", "vae", "vae"),
        ("sdxl", "unet", "denoiser"),
        ("sd3-medium-no-t5", "transformer", "denoiser"),
    ],
)
def test_what_a_file_lacks_is_taken_from_elsewhere(
    preset: str,
    missing: str,
    option: str,
    small: dict[str, Model],
    states: Callable[[str], dict[str, State]],
    tmp_path: Path,
) -> None:
    file = original(preset, states(preset))
    without(FIRST_STAGE if missing == "vae" else UNET)(file)
    path, folder = write(tmp_path, file), tokenizers(tmp_path / "pipeline", preset)
    plan = ExportPlan(path, tmp_path / "out", tokenizer=folder)
    with pytest.raises(CheckpointError, match=rf"missing component {missing}, .* Give one with --{option}, or use"):
        read_sources(plan)
    elsewhere = tmp_path / missing
    build(small[read_preset(preset).models[missing]], "full").save_pretrained(elsewhere)
    sources = read_sources(replace(plan, **{option: elsewhere}))
    assert sources.main.preset == preset
    assert {name: part.folder for name, part in parts(sources.main).items() if part.folder != path} == {
        missing: elsewhere
    }


@pytest.mark.parametrize(
    ("kind", "expected"), [("v_prediction", {"prediction_type": "v_prediction"}), ("flow", {}), (None, {})]
)
def test_verification_takes_from_the_bundle_what_a_file_predicts(
    kind: str | None, expected: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    components = {"vae_decoder": SimpleNamespace(role="vae_decoder", prediction_type=None)}
    if kind is not None:
        components["unet"] = SimpleNamespace(role="denoiser", prediction_type=kind)
    bundle = SimpleNamespace(manifest=SimpleNamespace(components=components))
    (tmp_path / "model.safetensors").touch()
    plan = ExportPlan(tmp_path / "model.safetensors", tmp_path / "out")
    assert _as_exported(plan, bundle).solver_config == expected
    directory = ExportPlan(checkpoint, tmp_path / "out")
    assert _as_exported(directory, bundle) == directory


def test_the_digest_covers_an_architecture_and_not_what_is_said_of_it(
    small: dict[str, Model], states: Callable[[str], dict[str, State]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = write(tmp_path, original("sd15", states("sd15"))), tokenizers(tmp_path / "pipeline", "sd15")
    monkeypatch.setattr(single_file, "model_file", lambda name: tmp_path / f"{name}.json")

    def digest(**changes: object) -> str:
        model = msgspec.structs.replace(small["unet-sd1"], **changes)
        monkeypatch.setitem(small, "unet-sd1", model)
        (tmp_path / "unet-sd1.json").write_bytes(msgspec.json.encode(model))
        denoiser = read_single_file(path, folder, None).denoiser
        return source_digest(denoiser.files, denoiser.facts)

    first = digest()
    assert digest(source="elsewhere") == first
    assert digest(config={**small["unet-sd1"].config, "norm_eps": 1e-6}) != first
