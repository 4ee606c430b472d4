"""LoRAs: diffusers and peft fuse the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model
from torch import nn

from tandemrt.export.lora import fuse, read_lora, require_used
from tandemrt.export.presets import models as presets
from tandemrt.export.random_checkpoint import build
from tandemrt.export.weights import Weights, read_header
from tandemrt.runtime.original_names import original_unet_names

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
    parts,
    peft,
    sd3,
    sd15,
    sdxl,
    write_lora,
    write_weights,
)

Models = Mapping[str, nn.Module]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
            write_lora(layout(adapters(models, seed, attention_only=attention_only)), tmp_path / f"{seed}.safetensors"),
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
    lora = read_lora(write_lora(layout(updates), tmp_path / "lora.safetensors"))
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
    lora = read_lora(write_lora(kohya(updates), tmp_path / "lora.safetensors"))
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
    lora = read_lora(write_lora(kohya({"unet": {name: flat}}), tmp_path / "lora.safetensors"))
    require_same(read(fuse(base, [(lora, 1.0)], "unet")), fused(unet.state_dict(), [({name: factors}, 1.0)]))


def test_text_encoders_are_known_with_and_without_their_prefix(tmp_path: Path) -> None:
    model = sd15()["text_encoder"]
    lora = read_lora(write_lora(kohya(adapters({"text_encoder": model})), tmp_path / "lora.safetensors"))
    for prefix in ("", "text_model."):
        names = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        path = write_lora(names, tmp_path / "text.safetensors")
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
