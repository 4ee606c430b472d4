"""Exports with LoRAs: the bundle paints what diffusers paints with the same LoRAs fused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import Added, ExportPlan, LoraSource
from tandemrt.export.presets import read_preset
from tandemrt.export.random_checkpoint import write_checkpoint
from tandemrt.export.sources import Sources, read_sources
from tandemrt.runtime import Pipeline
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import CheckpointError

from ..interop.picture import psnr_db
from .lora_files import adapters, fused_by_diffusers, kohya, peft, update

SCALES = (0.8, -0.5)
MINIMUM_PSNR_DB = 45.0


@pytest.fixture(scope="module")
def loras(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraSource, ...]:
    """Two LoRAs for the UNet and the text encoder of the small checkpoint, in two layouts."""
    folder = tmp_path_factory.mktemp("loras")
    models = {
        "unet": UNet2DConditionModel.from_pretrained(checkpoint / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(checkpoint / "text_encoder"),
    }
    save_file(kohya(adapters(models, 0), te="lora_te_"), folder / "a.safetensors")
    save_file(peft(adapters(models, 1)), folder / "b.safetensors")
    return tuple(LoraSource(folder / f"{name}.safetensors", scale) for name, scale in zip("ab", SCALES, strict=True))


def sources(checkpoint: Path, *loras: LoraSource, added: Sequence[Added] = ()) -> Sources:
    return read_sources(ExportPlan(checkpoint, Path("out"), tuple(added), loras=loras))


def digests(found: Sources) -> dict[str, str]:
    return {name: found.digest(part) for name, part in found.parts().items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")
def test_the_bundle_paints_what_diffusers_paints(
    checkpoint: Path, loras: tuple[LoraSource, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": 16, "width": 16}
    reference = StableDiffusionPipeline.from_pretrained(checkpoint)
    reference.set_progress_bar_config(disable=True)

    def expected() -> np.ndarray:
        generator = torch.Generator().manual_seed(7)
        return reference("a red circle", **arguments, generator=generator, output_type="np").images[0]

    unfused = expected()
    fused_by_diffusers(reference, [(lora.path, lora.scale) for lora in loras])
    wanted = expected()
    out = export_bundle(ExportPlan(checkpoint, tmp_path / "bundle", loras=loras))
    with Pipeline.open(out) as pipeline:
        ours = pipeline("a red circle", **arguments, seed=7, output_type="np").images[0]
    assert psnr_db(ours, wanted) >= MINIMUM_PSNR_DB
    assert psnr_db(unfused, wanted) < MINIMUM_PSNR_DB - 10
    sources = ["--checkpoint", str(checkpoint), *(w for lora in loras for w in ("--lora", f"{lora.path}:{lora.scale}"))]
    assert main(["verify", str(out), *sources]) == 0
    assert main(["verify", str(out), *sources[:-2]]) == 1
    assert "not what the component was exported from" in capsys.readouterr().err


def test_further_denoisers_keep_their_weights(checkpoint: Path, loras: tuple[LoraSource, ...]) -> None:
    found = sources(checkpoint, *loras, added=[Added("unet_small", checkpoint)])
    name = "conv_in.weight"
    stored = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")[name]
    torch.testing.assert_close(found.denoisers["unet_small"].part.weights.load(name), stored, rtol=0, atol=0)
    assert not torch.allclose(found.main.denoiser.weights.load(name), stored, atol=1e-2)


def test_the_digest_covers_loras_and_their_scales(checkpoint: Path, loras: tuple[LoraSource, ...]) -> None:
    first, second = loras
    plain, once = digests(sources(checkpoint)), digests(sources(checkpoint, first))
    changed = {name for name in plain if plain[name] != once[name]}
    assert changed == {"unet", "text_encoder"}
    assert once == digests(sources(checkpoint, LoraSource(first.path, first.scale)))
    unets = [
        plain["unet"],
        once["unet"],
        digests(sources(checkpoint, LoraSource(first.path, first.scale + 1e-9)))["unet"],
        digests(sources(checkpoint, second))["unet"],
        digests(sources(checkpoint, first, second))["unet"],
        digests(sources(checkpoint, first, first))["unet"],
    ]
    assert len(set(unets)) == len(unets)


def test_the_plan_tells_of_loras_before_torch_is_needed(checkpoint: Path, loras: tuple[LoraSource, ...]) -> None:
    program = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from tandemrt.export.plan import ExportPlan, parse_lora\n"
        "from tandemrt.export.sources import describe\n"
        "plan = ExportPlan(Path(sys.argv[1]), Path('nowhere'), loras=tuple(map(parse_lora, sys.argv[2:])))\n"
        "print(json.dumps(describe(plan)))\n"
    )
    given = [f"{lora.path}:{lora.scale}" for lora in loras]
    command = [sys.executable, "-c", program, str(checkpoint), *given]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert facts["loras"] == [{"path": str(lora.path), "scale": lora.scale} for lora in loras]
    assert set(facts["components"]) == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}


def test_a_lora_for_another_base_stops_the_export(
    checkpoint: Path, loras: tuple[LoraSource, ...], tmp_path: Path
) -> None:
    tensors = load_file(loras[0].path)
    foreign = {name.replace("lora_te_", "lora_te2_"): tensor for name, tensor in tensors.items()}
    save_file(foreign, tmp_path / "foreign.safetensors")
    plan = ExportPlan(checkpoint, tmp_path / "bundle", loras=(LoraSource(tmp_path / "foreign.safetensors"),))
    complaint = (
        r"foreign\.safetensors: lora_te2_text_model_.*a LoRA for another base model: .*expected modules of .*unet"
    )
    with pytest.raises(CheckpointError, match=complaint):
        export_bundle(plan)
    assert not plan.out.exists()


def test_a_lora_of_sd3_changes_its_transformer_and_the_second_clip(tmp_path: Path) -> None:
    """The third text encoder, T5, has no LoRAs."""
    write_checkpoint(read_preset("sd3-medium"), tmp_path, "tiny")
    checkpoint, file = tmp_path / "checkpoint", tmp_path / "lora.safetensors"
    attention, perceptron = "transformer_blocks.0.attn.add_k_proj", "text_model.encoder.layers.3.mlp.fc2"
    main = sources(checkpoint).main
    shape = main.denoiser.weights.shapes[f"{attention}.weight"]
    text_shape = main.texts["text_encoder_2"].encoder.weights.shapes[f"{perceptron}.weight"]
    changes = update(f"transformer.{attention}", shape, "lora_A", "lora_B")
    save_file({**changes, **update(f"lora_te2_{perceptron.replace('.', '_')}", text_shape)}, file)
    after = sources(checkpoint, LoraSource(file, 0.125)).main
    for part, changed, name in (
        (main.denoiser, after.denoiser, attention),
        (main.texts["text_encoder_2"].encoder, after.texts["text_encoder_2"].encoder, perceptron),
    ):
        expected = part.weights.load(f"{name}.weight").float() + 0.125
        torch.testing.assert_close(changed.weights.load(f"{name}.weight"), expected)
    assert after.texts["text_encoder_3"] == main.texts["text_encoder_3"]
