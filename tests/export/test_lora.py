"""LoRAs: diffusers and peft fuse the same weights, and what cannot be fused is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from tandemrt.export.lora import fuse, read_lora, require_used
from tandemrt.export.original_names import original_unet_names
from tandemrt.export.presets import models as presets
from tandemrt.export.random_checkpoint import build
from tandemrt.export.weights import SafetensorsFile, Weights, read_header
from tandemrt.runtime.errors import CheckpointError

from .lora_files import (
    Adapters,
    Factors,
    Tensors,
    adapters,
    diffusers,
    fused,
    fused_by_diffusers,
    kohya,
    old_attention,
    peft,
    sd3,
    sd15,
    sdxl,
    update,
    write_weights,
)

Models = Mapping[str, nn.Module]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def write(tensors: Tensors, path: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def parts(models: Models, folder: Path) -> dict[Any, SafetensorsFile]:
    return {part: write_weights(model, folder / f"{part}.safetensors") for part, model in models.items()}


def read(weights: Weights) -> Tensors:
    return {name: weights.load(name) for name in weights.shapes}


def require_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), name


def pipeline_of(models: Models) -> Any:
    if "transformer" in models:
        others = ("vae", "tokenizer", "tokenizer_2", "text_encoder_3", "tokenizer_3", "scheduler")
        return StableDiffusion3Pipeline(**models, **dict.fromkeys(others))
    if "text_encoder_2" in models:
        others = ("vae", "tokenizer", "tokenizer_2", "scheduler")
        return StableDiffusionXLPipeline(**models, **dict.fromkeys(others), add_watermarker=False)
    others = ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    return StableDiffusionPipeline(**models, **dict.fromkeys(others), requires_safety_checker=False)


def kohya_without_sizes(updates: Adapters) -> Tensors:
    """diffusers 0.42 cannot map kohya's names of the embedding of sizes."""
    return {name: tensor for name, tensor in kohya(updates).items() if "add_embedding" not in name}


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
@pytest.mark.parametrize(
    ("family", "layout", "attention_only"),
    [
        (sd15, partial(kohya, te="lora_te_"), False),
        (sdxl, kohya_without_sizes, False),
        (sdxl, partial(kohya, original=True), False),
        (sd15, peft, False),
        (sdxl, diffusers, False),
        (sd3, peft, False),
        (sd15, old_attention, True),
    ],
    ids=["kohya-sd15", "kohya-sdxl", "kohya-original", "peft-sd15", "diffusers-sdxl", "peft-sd3", "old-attention"],
)
def test_diffusers_fuses_the_same(
    tmp_path: Path, family: Callable[[], Models], layout: Callable[[Adapters], Tensors], attention_only: bool
) -> None:
    models = family()
    weights = parts(models, tmp_path)
    files = [
        (
            write(layout(adapters(models, seed, attention_only=attention_only)), tmp_path / f"{seed}.safetensors"),
            scale,
        )
        for seed, scale in enumerate((0.125, 0.8, -0.5))
    ]
    loras = [(read_lora(path), scale) for path, scale in files]
    for lora, _ in loras:
        require_used(lora, weights)
    fused_by_diffusers(pipeline_of(models), files)
    for part, model in models.items():
        require_same(read(fuse(weights[part], loras, part)), model.state_dict())


@pytest.mark.parametrize("layout", [kohya, partial(kohya, original=True)], ids=["kohya", "original"])
def test_every_module_has_an_alpha_of_its_own(tmp_path: Path, layout: Callable[[Adapters], Tensors]) -> None:
    """Against the definition, as diffusers 0.42 loses the alphas of attentions that differ from most."""
    models = sdxl()
    weights = parts(models, tmp_path)
    updates = adapters(models, alphas=(0.5, 8.0))
    lora = read_lora(write(layout(updates), tmp_path / "lora.safetensors"))
    require_used(lora, weights)
    for part, own in weights.items():
        require_same(read(fuse(own, [(lora, 0.8), (lora, -0.5)], part)), fused(read(own), [(updates[part], 0.3)]))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_merges_the_same_from_its_folder(tmp_path: Path, use_rslora: bool) -> None:
    unet = sd15()["unet"]
    weights = {"unet": write_weights(unet, tmp_path / "unet.safetensors")}
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "conv1", "proj_in", "linear_1"],
        rank_pattern={"to_k": 2, "attn2.to_q": 3, "^time_embedding.linear_1": 1},
        alpha_pattern={"down_blocks.0.resnets.0.conv1": 9, "attn2.to_q": 1.5},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(unet, config)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    lora = read_lora(tmp_path / "adapter")
    require_used(lora, weights)
    assert {path.name for path in lora.files} == {"adapter_config.json", "adapter_model.safetensors"}
    require_same(read(fuse(weights["unet"], [(lora, 1.0)], "unet")), merged)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
def test_alphas_are_read_from_the_header_that_diffusers_writes(tmp_path: Path) -> None:
    models = sd15()
    weights = parts(models, tmp_path)
    updates = adapters(models, alphas=(0.5, 8.0))
    layers: dict[str, Any] = {}
    for part, modules in updates.items():
        config = LoraConfig(
            target_modules=list(modules),
            rank_pattern={f"^{name}": len(factors.down) for name, factors in modules.items()},
            alpha_pattern={f"^{name}": factors.alpha for name, factors in modules.items()},
        )
        layers[f"{part}_lora_adapter_metadata"] = config.to_dict()
        layers[f"{part}_lora_layers"] = {
            **{f"{name}.lora_A.weight": factors.down for name, factors in modules.items()},
            **{f"{name}.lora_B.weight": factors.up for name, factors in modules.items()},
        }
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    lora = read_lora(file)
    require_used(lora, weights)
    fused_by_diffusers(pipeline_of(models), [(file, 0.125)])
    for part, model in models.items():
        require_same(read(fuse(weights[part], [(lora, 0.125)], part)), model.state_dict())


def test_what_no_lora_changes_stays_as_it_is_stored(tmp_path: Path) -> None:
    unet = sd15()["unet"].half()
    base = write_weights(unet, tmp_path / "unet.safetensors")
    updates = {"unet": {"conv_in": adapters({"unet": unet})["unet"]["conv_in"]}}
    lora = read_lora(write(kohya(updates), tmp_path / "lora.safetensors"))
    unchanged, changed = fuse(base, [(lora, 0.0)], "unet"), fuse(base, [(lora, 1.0)], "unet")
    assert unchanged.shapes == base.shapes
    assert unchanged.files == (base.path, tmp_path / "lora.safetensors")
    for name in base.shapes:
        torch.testing.assert_close(unchanged.load(name).half(), base.load(name), rtol=0, atol=0)
        same = torch.equal(changed.load(name), base.load(name))
        assert changed.load(name).dtype == (torch.float32 if name == "conv_in.weight" else torch.float16)
        assert same == (name != "conv_in.weight")
    assert not fuse(base, [(lora, 1.0)], "text_encoder").updates


def test_a_linear_update_fits_a_convolution_of_one_pixel(tmp_path: Path) -> None:
    """Stable Diffusion 1's attentions end in such convolutions; trainers take them for linear layers."""
    unet = sd15()["unet"]
    base = write_weights(unet, tmp_path / "unet.safetensors")
    name = "mid_block.attentions.0.proj_in"
    factors = adapters({"unet": unet})["unet"][name]
    flat = Factors(factors.down.flatten(1), factors.up.flatten(1), factors.alpha)
    lora = read_lora(write(kohya({"unet": {name: flat}}), tmp_path / "lora.safetensors"))
    require_same(read(fuse(base, [(lora, 1.0)], "unet")), fused(unet.state_dict(), [({name: factors}, 1.0)]))


def test_text_encoders_are_known_with_and_without_their_prefix(tmp_path: Path) -> None:
    model = sd15()["text_encoder"]
    lora = read_lora(write(kohya(adapters({"text_encoder": model})), tmp_path / "lora.safetensors"))
    for prefix in ("", "text_model."):
        names = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        path = write(names, tmp_path / "text.safetensors")
        require_used(lora, {"text_encoder": read_header(path)})


@pytest.mark.parametrize("name", [name for name, model in presets().items() if model.class_name.startswith("UNet")])
def test_original_names_are_those_that_diffusers_reads(name: str) -> None:
    """diffusers' converter of single files is the oracle: it takes the original names and gives its own."""
    with torch.device("meta"):
        unet = build(presets()[name], "tiny")
    # LCM's guidance embedding is younger than the original code.
    weights = {key: t for key, t in unet.state_dict().items() if not key.startswith("time_embedding.cond_proj.")}
    modules = {key.rpartition(".")[0] for key in weights}
    originals = original_unet_names(modules)
    assert originals.keys() == modules
    assert len(set(originals.values())) == len(modules)
    flat = {spelling.replace(".", "_") for spelling in (*modules, *originals.values())}
    assert len(flat) == 2 * len(modules)
    state = {
        f"model.diffusion_model.{originals[module]}.{last}": tensor
        for (module, _, last), tensor in ((key.rpartition("."), tensor) for key, tensor in weights.items())
    }
    converted = convert_ldm_unet_checkpoint(state, dict(unet.config))
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == {
        key: tuple(tensor.shape) for key, tensor in weights.items()
    }


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"{m}.dora_scale": torch.ones(8, 1)}, r"dora_scale: DoRA is not supported, got .*Merge it into its base"),
        ({"{m}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector: DoRA is not supported"),
        ({"x.alpha": torch.ones(()), "x.hada_w1_a": torch.ones(8, 2)}, "hada_w1_a: LoHa is not supported"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "lokr_w1: LoKr is not supported"),
        ({"{m}.lora_mid.weight": torch.ones(1, 1, 3, 3)}, "lora_mid.weight: a convolution in three factors is not"),
        ({"{m}.diff_b": torch.ones(8)}, r"diff_b: a tensor that is no low-rank update, got 'shape \(8,\)'"),
        ({"{m}.diff": torch.full((8, 4), 1e-3)}, "diff: a tensor that is no low-rank update"),
        ({"x.alpha": torch.ones(())}, "x.alpha: a tensor that is no low-rank update"),
        ({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, "conv_in.weight: a tensor that is no low-rank update"),
        ({"x.lora_up.weight": torch.ones(8, 1)}, r"x.lora_up.weight: half of an update, expected x.lora_down.weight"),
        ({"x.lora_A.weight": torch.ones(1, 8)}, r"x.lora_A.weight: half of an update, expected x.lora_B.weight"),
        ({"{m}.alpha": torch.ones(2)}, r"alpha: shape, got \(2,\), expected one number"),
        (
            {"{m}.lora_up.weight": torch.ones(8, 2, 1, 1)},
            r"lora_down.weight: ranks of the two halves .* \(8, 2, 1, 1\)",
        ),
        ({"{m}.lora_up.weight": torch.ones(8, 1, 3, 1)}, "lora_down.weight: ranks of the two halves"),
        (
            {"{m}.lora_down.weight": torch.ones(0, 4, 3, 3), "{m}.lora_up.weight": torch.ones(8, 0, 1, 1)},
            "ranks of the",
        ),
        ({"{m}.lora_down.weight": torch.ones(1)}, "ranks of the two halves"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(tmp_path: Path, extra: Tensors, complaint: str) -> None:
    changed = {name.format(m="lora_unet_conv_in"): tensor for name, tensor in extra.items()}
    path = write({**update("lora_unet_conv_in", (8, 4, 3, 3)), **changed}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_lora(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_changes_by_nothing_are_let_through(tmp_path: Path) -> None:
    nothing = {"lora_unet_conv_in.diff_b": torch.zeros(8), "lora_unet_conv_norm_out.diff": torch.zeros(8)}
    path = write({**update("lora_unet_conv_in", (8, 4, 3, 3)), **nothing}, tmp_path / "x.safetensors")
    assert [each.module for each in read_lora(path).updates] == ["lora_unet_conv_in"]


def test_files_that_hold_no_lora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: cannot be read .No such file"):
        read_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no LoRA in it, expected tensors such as"):
        read_lora(write({"y.diff": torch.zeros(1)}, tmp_path / "x.safetensors"))
    (tmp_path / "x.pt").touch()
    with pytest.raises(CheckpointError, match=r"x\.pt: pickled weights are refused.*--allow-pickle"):
        read_lora(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"not a folder of peft's, expected adapter_config\.json"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"peft_type": "LOHA"}, "peft_type: not a plain LoRA, got 'LOHA', expected 'LORA' or None"),
        ({"use_dora": True}, "use_dora: not a plain LoRA, got True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: not a plain LoRA, got 'pissa_niter_4'"),
        ({"r": 3}, "adapter_config.json: conv_in: rank that differs from the tensors', got 3.0, expected 1"),
        ({"rank_pattern": {"in": 2}, "r": 1}, None),
        ({"rank_pattern": {"(.*)*x": 1}}, "rank_pattern: patterns, got .*expected names of modules"),
        ({"alpha_pattern": [1]}, "alpha_pattern: patterns"),
        ({"lora_alpha": None}, "lora_alpha: number, got None"),
        ({"lora_alpha": 10**400}, "lora_alpha: number, got 1000"),
        ({"lora_alpha": math.nan}, "lora_alpha: number, got nan"),
        (None, "adapter_model.bin: pickled weights are refused"),
    ],
)
def test_folders_of_peft_are_held_to_their_configuration(
    tmp_path: Path, change: dict[str, Any] | None, complaint: str | None
) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, **(change or {})}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if change is None:
        (tmp_path / "adapter_model.bin").touch()
    else:
        write(update("base_model.model.conv_in", (8, 4), "lora_A", "lora_B"), tmp_path / "adapter_model.safetensors")
    if complaint is None:
        assert read_lora(tmp_path).updates[0].alpha == 2
    else:
        with pytest.raises(CheckpointError, match=complaint):
            read_lora(tmp_path)


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model."])
def test_a_folder_has_one_configuration_for_every_module(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    write(update(f"{prefix}conv_in", (8, 4), "lora_A", "lora_B"), tmp_path / "adapter_model.safetensors")
    assert read_lora(tmp_path).updates[0].alpha == 2


def test_a_header_that_configures_other_modules_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"text_encoder.r": 1, "text_encoder.lora_alpha": 2})
    path = write(update("unet.conv_in", (8, 4)), tmp_path / "x.safetensors", lora_adapter_metadata=header)
    complaint = r"unet\.conv_in\.lora_down.*says nothing of, got \"prefix 'unet\.'\", expected 'text_encoder\.'"
    with pytest.raises(CheckpointError, match=complaint):
        read_lora(path)


@pytest.mark.parametrize("folder", [True, False], ids=["peft", "file"])
def test_pickled_loras_are_read_by_leave(tmp_path: Path, folder: bool) -> None:
    """SDXS' anime adapter is published as a folder of peft's with `adapter_model.bin`."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    tensors = update("base_model.model.conv_in", (8, 4, 3, 3), "lora_A", "lora_B")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    lora = read_lora(tmp_path if folder else tmp_path / "adapter_model.bin", allow_pickle=True)
    expected = weights.load("conv_in.weight") + (2 if folder else 1)
    torch.testing.assert_close(fuse(weights, [(lora, 1.0)], "unet").load("conv_in.weight"), expected)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 99_999])
def test_a_damaged_configuration_in_a_header_is_refused(tmp_path: Path, text: str) -> None:
    path = write(update("unet.conv_in", (8, 4)), tmp_path / "x.safetensors", lora_adapter_metadata=text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: lora_adapter_metadata: (not JSON|content, got 'list')"):
        read_lora(path)


def test_loras_for_another_base_are_refused(tmp_path: Path) -> None:
    weights = parts(sd15(), tmp_path)
    for tensors, complaint in (
        (
            update("lora_unet_add_embedding_linear_1", (8, 4)),
            r"lora_unet_add_embedding_linear_1.lora_down.weight: a LoRA for another base model: 1 of 2 updates have no "
            r"weight to change, got 'an update of shape \(8, 4\)', expected modules of text_encoder, unet. Give it",
        ),
        (update("base_model.model.text_model.encoder.layers.0.mlp.fc1", (32, 16)), "1 of 2 updates"),
    ):
        path = write({**tensors, **update("lora_unet_conv_in", (8, 4, 3, 3))}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=complaint):
            require_used(read_lora(path), weights)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("conv_in", (8, 9, 3, 3)),
        ("conv_in", (8, 4)),
        ("conv_in", (8, 4, 1, 1)),
        ("time_embedding.linear_1", (33, 8)),
        ("time_embedding.linear_1", (32, 8, 3, 3)),
    ],
)
def test_updates_of_another_shape_are_refused(tmp_path: Path, module: str, shape: tuple[int, ...]) -> None:
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    lora = read_lora(write(update(f"unet.{module}", shape), tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        fuse(weights, [(lora, 1.0)], "unet")
    message = str(caught.value)
    assert f"x.safetensors: unet.{module}.lora_down.weight: a LoRA for another base model" in message
    assert f"got {shape}, expected {weights.shapes[f'{module}.weight']}. Give it to the base model" in message


def test_two_updates_of_one_weight_are_refused(tmp_path: Path) -> None:
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    twice = {**update("lora_unet_conv_in", (8, 4, 3, 3)), **update("lora_unet_input_blocks_0_0", (8, 4, 3, 3))}
    lora = read_lora(write(twice, tmp_path / "x.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"a second update of conv_in\.weight, got 'lora_unet_.* too', expected one"
    ):
        fuse(weights, [(lora, 1.0)], "unet")


@pytest.mark.parametrize("broken", ["lora_down.weight", "lora_up.weight", "alpha"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_updates_that_are_not_finite_are_named(tmp_path: Path, broken: str, value: float) -> None:
    weights = write_weights(sd15()["unet"], tmp_path / "unet.safetensors")
    tensors = {**update("lora_unet_conv_in", (8, 4, 3, 3)), "lora_unet_conv_in.alpha": torch.ones(())}
    tensors[f"lora_unet_conv_in.{broken}"].view(-1)[0] = value
    lora = read_lora(write(tensors, tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match=r"x.safetensors: lora_unet_conv_in.lora_down.weight: .*NaN or infinite"):
        fuse(weights, [(lora, 0.0)], "unet").load("conv_in.weight")
