"""Single files in their authors' layout: every tensor is diffusers' own, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import save_file

from tandemrt.export import single_file
from tandemrt.export.bundle import export_bundle
from tandemrt.export.checkpoint import Checkpoint, Part, read_checkpoint
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.presets import Model, models, read_preset
from tandemrt.export.random_tokenizer import write_tokenizer
from tandemrt.export.remapped import Origin
from tandemrt.export.single_file import read_single_file
from tandemrt.export.sources import read_sources
from tandemrt.export.text_encoders import text_encoder_graph
from tandemrt.export.verify import _as_exported
from tandemrt.export.weights import source_digest
from tandemrt.runtime.errors import ArgumentError, CheckpointError
from tandemrt.runtime.manifest import MANIFEST_NAME, TextEncoding, decode

from .original import VOCABULARY, State, config_of, original, random_states, small_models

PRESETS = ("sd15", "sd21", "sdxl", "ssd-1b", "koala-700m", "sd3-medium", "sd3-medium-no-t5")
TRAINING = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00weight": torch.ones(1),
    "alphas_cumprod": torch.ones(1000),
    "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
    "posterior_mean_coef1": torch.ones(1000),
    "betas": torch.ones(1000),
    "denoiser.sigmas": torch.ones(1000),
    "cond_stage_model.text_projection": torch.ones(2, 2),
    "cond_stage_model.logit_scale": torch.ones(()),
}


@pytest.fixture(scope="module")
def states() -> Callable[[str], dict[str, State]]:
    kept: dict[str, dict[str, State]] = {}
    return lambda preset: kept.setdefault(preset, random_states(preset))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """Every preset's architectures as the small ones that the tests write."""
    every = {name: model for preset in (*PRESETS, "sd21-base") for name, model in small_models(preset).items()}
    monkeypatch.setattr(single_file, "models", lambda: every)
    return every


def tokenizers(folder: Path, preset: str) -> Path:
    """A pipeline directory's tokenizers, those that the preset's text encoders want."""
    for component, name in read_preset(preset).models.items():
        if component.startswith("text_encoder"):
            path = folder / component.replace("text_encoder", "tokenizer")
            write_tokenizer(path, VOCABULARY, 77, str(models()[name].pad_token))
    return folder


def write(folder: Path, tensors: State) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def parts(checkpoint: Checkpoint) -> dict[str, Part]:
    texts = {name: source.encoder for name, source in checkpoint.texts.items()}
    return {checkpoint.family.denoiser: checkpoint.denoiser, "vae": checkpoint.vae, **texts}


def converted(preset: str, file: State) -> dict[str, State]:
    """What diffusers' own converters make of a file, by component; they take the dictionaries apart that they get."""
    found: dict[str, State] = {"vae": oracle.convert_ldm_vae_checkpoint(dict(file), config_of(preset, "vae"))}
    for component, name in read_preset(preset).models.items():
        if component == "unet":
            found[component] = oracle.convert_ldm_unet_checkpoint(dict(file), config_of(preset, component))
        elif component == "transformer":
            own = {key: tensor for key, tensor in file.items() if key.startswith("model.diffusion_model.")}
            found[component] = oracle.convert_sd3_transformer_checkpoint_to_diffusers(own)
        elif name == "t5-xxl":
            found[component] = oracle.convert_sd3_t5_checkpoint_to_diffusers(dict(file))
        elif name.startswith("openclip") and not preset.startswith("sd3"):
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=config_of(preset, component)["hidden_size"]))
            prefix = "cond_stage_model.model." if component == "text_encoder" else "conditioner.embedders.1.model."
            found[component] = oracle.convert_open_clip_checkpoint(model, dict(file), prefix)
        elif component != "vae":
            which = "clip_l" if component == "text_encoder" else "clip_g"
            found[component] = oracle.convert_ldm_clip_checkpoint(dict(file), f"text_encoders.{which}.transformer.")
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_is_the_one_that_diffusers_finds(
    preset: str, states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file = original(preset, states(preset))
    path = write(tmp_path, {**file, **TRAINING})
    checkpoint = read_single_file(path, tokenizers(tmp_path / "pipeline", preset), "v_prediction")
    assert checkpoint.scheduler == read_preset(preset).scheduler
    assert checkpoint.zero_negative == (read_preset(preset).pipeline == "StableDiffusionXLPipeline")
    expected = converted(preset, file)
    own = parts(checkpoint)
    assert own.keys() == expected.keys() == states(preset).keys()
    for component, part in own.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in expected[component].items()}
        assert part.weights.shapes == shapes, component
        assert _bare(part.weights.shapes) == _bare(states(preset)[component])
        for name, tensor in expected[component].items():
            assert torch.equal(part.weights.load(name), tensor), f"{component}: {name}"


def _bare(names: Iterable[str]) -> set[str]:
    """Without what versions of transformers add or leave out."""
    return {name.removeprefix("text_model.") for name in names} - {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize(("kind", "size"), [("epsilon", 8), ("v_prediction", 12)])
def test_what_stable_diffusion_2_predicts_is_asked_for(
    kind: str, size: int, states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    path, folder = write(tmp_path, original("sd21", states("sd21"))), tokenizers(tmp_path / "pipeline", "sd21")
    checkpoint = read_single_file(path, folder, kind)
    assert checkpoint.scheduler.config.get("prediction_type", "epsilon") == kind
    assert checkpoint.denoiser.config["sample_size"] == size
    for unknown in (None, "sample"):
        with pytest.raises(
            ArgumentError,
            match=rf"prediction_type: cannot be told from the tensors of .*, got {unknown!r}, expected epsilon or "
            r"v_prediction\. Give --solver-config prediction_type=epsilon",
        ):
            read_single_file(path, folder, unknown)


def test_a_projection_that_sd3_leaves_out_is_the_identity(
    states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file = original("sd3-medium-no-t5", states("sd3-medium-no-t5"))
    del file["text_encoders.clip_l.transformer.text_projection.weight"]
    checkpoint = read_single_file(write(tmp_path, file), tokenizers(tmp_path / "pipeline", "sd3-medium-no-t5"), None)
    weights = checkpoint.texts["text_encoder"].encoder.weights
    assert weights.shapes["text_projection.weight"] == (96, 96)
    assert torch.equal(weights.load("text_projection.weight"), torch.eye(96))


def test_a_scalar_of_positions_beside_no_projection_is_named(
    states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file, clip = original("sd3-medium-no-t5", states("sd3-medium-no-t5")), "text_encoders.clip_l.transformer."
    del file[f"{clip}text_projection.weight"]
    file[f"{clip}text_model.embeddings.position_embedding.weight"] = torch.ones(())
    checkpoint = read_single_file(write(tmp_path, file), tokenizers(tmp_path / "pipeline", "sd3-medium-no-t5"), None)
    with pytest.raises(CheckpointError, match=r"of another shape: .*position_embedding\.weight \(\) instead of"):
        text_encoder_graph(checkpoint.texts["text_encoder"].encoder, TextEncoding(max_length=77, width=96))


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


def _without(prefix: str) -> Callable[[State], object]:
    return lambda file: [file.pop(name) for name in list(file) if name.startswith(prefix)]


def _only(prefix: str) -> Callable[[State], object]:
    return lambda file: [file.pop(name) for name in list(file) if not name.startswith(prefix)]


UNET = "model.diffusion_model."
DAMAGES: dict[str, tuple[str, Callable[[State], object], str]] = {
    "a tensor of no model": (
        "sd15",
        lambda file: file.update({"lora_unet_down.weight": torch.ones(1)}),
        r"model\.safetensors: tensors that are of none of its models: lora_unet_down\.weight, expected those of Stable",
    ),
    "a tensor that its model does not know": (
        "sd15",
        lambda file: file.update({f"{UNET}input_blocks.1.0.extra.weight": torch.ones(1)}),
        r"none of its models: model\.diffusion_model\.input_blocks\.1\.0\.extra\.weight",
    ),
    "a sampler before the first level": (
        "sd15",
        lambda file: file.update({f"{UNET}input_blocks.0.0.op.weight": torch.ones(1)}),
        r"none of its models: model\.diffusion_model\.input_blocks\.0\.0\.op\.weight",
    ),
    "two tensors for one": (
        "sd15",
        lambda file: file.update({f"{UNET}output_blocks.2.2.conv.bias": torch.ones(1)}),
        r"output_blocks\.2\.2\.conv\.bias: a second tensor for up_blocks\.0\.upsamplers\.0\.conv\.bias",
    ),
    "no autoencoder": ("sd15", _without("first_stage_model."), r"missing component vae, expected tensors first_stage"),
    "no text encoders": (
        "sd3-medium-no-t5",
        _without("text_encoders."),
        r"missing component text_encoder, expected tensors text_encoders\.clip_l\.transformer\.\*",
    ),
    "a UNet alone": ("sd15", _only(UNET), r"not a checkpoint in its authors' layout .it holds model\.diffusion_model"),
    "a refiner": (
        "sdxl",
        _without("conditioner.embedders.0."),
        r"missing component text_encoder, expected tensors conditioner\.embedders\.0\.transformer\.\*",
    ),
    "a type of eight bits": (
        "sd15",
        lambda file: file.update({f"{UNET}out.2.bias": torch.ones(4).to(torch.float8_e4m3fn)}),
        r"model\.diffusion_model\.out\.2\.bias: dtype that is not supported, got 'F8_E4M3'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_understood_whole_is_refused(
    damage: str, states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    preset, break_it, complaint = DAMAGES[damage]
    file = original(preset, states(preset))
    break_it(file)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_single_file(write(tmp_path, file), tokenizers(tmp_path / "pipeline", preset), None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda file: file.pop(f"{UNET}out.2.bias"),
            r"missing weights: conv_out\.bias, expected those",
        ),
        (
            lambda file: file.update({f"{UNET}input_blocks.0.0.weight": torch.ones(40, 9, 3, 3)}),
            r"weights of another shape: conv_in\.weight \(40, 9, 3, 3\) instead of \(40, 4, 3, 3\).*unet-sd1\.json",
        ),
        (
            lambda file: file[f"{UNET}out.2.bias"].fill_(float("inf")),
            r"NaN or infinite weights in conv_out\.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[State], object], complaint: str, states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file = {name: tensor.clone() for name, tensor in original("sd15", states("sd15")).items()}
    change(file)
    checkpoint = read_single_file(write(tmp_path, file), tokenizers(tmp_path / "pipeline", "sd15"), None)
    with pytest.raises(CheckpointError, match=complaint):
        denoiser_graph(checkpoint.denoiser)


def test_what_does_not_divide_into_blocks_keeps_its_shape() -> None:
    fused = Origin("qkv", block=1, blocks=3)
    assert fused.shape((6, 5)) == (2, 5)
    assert torch.equal(fused.tensor(torch.arange(6)), torch.tensor([2, 3]))
    assert fused.shape((7, 5)) == (7, 5)
    assert fused.tensor(torch.ones(7, 5)).shape == (7, 5)
    assert fused.shape(()) == ()


def test_only_convolutions_of_one_pixel_are_flattened() -> None:
    flat = Origin("q", "flattened")
    for shape, expected in (((4, 4, 1, 1), (4, 4)), ((4, 4), (4, 4)), ((4, 4, 3, 3), (4, 4, 3, 3)), ((4,), (4,))):
        assert flat.shape(shape) == tuple(flat.tensor(torch.ones(shape)).shape) == expected


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


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "model.ckpt",
            r"a pickled checkpoint, expected a \.safetensors file\. Load it with diffusers' from_single_file",
        ),
        ("model.safetensors", "safetensors header size"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, complaint: str) -> None:
    torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=complaint):
        read_single_file(tmp_path / name, None, None)


def test_a_directory_has_its_own_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--tokenizer: a diffusers directory has its own"):
        read_sources(ExportPlan(checkpoint, tmp_path / "out", tokenizer=checkpoint / "tokenizer"))


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


@pytest.mark.slow
def test_a_bundle_of_one_file_is_the_bundle_of_its_directory(
    checkpoint: Path, tiny: Path, half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"unet": "unet-sd1", "vae": "vae-kl", "text_encoder": "clip-l"}
    directory = read_checkpoint(checkpoint)
    loaded = {
        name: {key: part.weights.load(key).float() for key in part.weights.shapes}
        for name, part in parts(directory).items()
    }
    mini = {
        names[name]: msgspec.structs.replace(models()[names[name]], config=dict(part.config), pad_token=None)
        for name, part in parts(directory).items()
    }
    monkeypatch.setattr(single_file, "models", lambda: mini)
    preset = msgspec.structs.replace(read_preset("sd15"), scheduler=directory.scheduler)
    monkeypatch.setattr(single_file, "read_preset", lambda name: preset)
    path = write(tmp_path, original("sd15", loaded, mini))
    added, tokenizer = (Added("vae_decoder_tiny", tiny),), checkpoint / "tokenizer"
    one = export_bundle(ExportPlan(path, tmp_path / "one", added, dtype="fp16", tokenizer=tokenizer))
    digests = [
        {name: record.sha256 for name, record in decode((bundle / MANIFEST_NAME).read_bytes(), "").files.items()}
        for bundle in (one, half_bundle)
    ]
    assert digests[0] == digests[1]
