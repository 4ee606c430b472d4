"""Single files that are not understood whole, or do not fit: what is wrong with them is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.single_file import read_single_file
from tandemrt.export.text_encoders import text_encoder_graph
from tandemrt.runtime.errors import CheckpointError
from tandemrt.runtime.manifest import TextEncoding

from .original import State, original
from .single_files import FIRST_STAGE, UNET, tokenizers, without, write

pytestmark = pytest.mark.usefixtures("small")


def _only(prefix: str) -> Callable[[State], object]:
    return lambda file: [file.pop(name) for name in list(file) if not name.startswith(prefix)]


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
    "no autoencoder": ("sd15", without(FIRST_STAGE), r"missing component vae, expected tensors first_stage"),
    "no text encoders": (
        "sd3-medium-no-t5",
        without("text_encoders."),
        r"missing component text_encoder, expected tensors text_encoders\.clip_l\.transformer\.\*",
    ),
    "a UNet alone": ("sd15", _only(UNET), r"not a checkpoint in its authors' layout .it holds model\.diffusion_model"),
    "a refiner": (
        "sdxl",
        without("conditioner.embedders.0."),
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


def test_a_scalar_of_positions_beside_no_projection_is_named(
    states: Callable[[str], dict[str, State]], tmp_path: Path
) -> None:
    file, clip = original("sd3-medium-no-t5", states("sd3-medium-no-t5")), "text_encoders.clip_l.transformer."
    del file[f"{clip}text_projection.weight"]
    file[f"{clip}text_model.embeddings.position_embedding.weight"] = torch.ones(())
    checkpoint = read_single_file(write(tmp_path, file), tokenizers(tmp_path / "pipeline", "sd3-medium-no-t5"), None)
    with pytest.raises(CheckpointError, match=r"of another shape: .*position_embedding\.weight \(\) instead of"):
        text_encoder_graph(checkpoint.texts["text_encoder"].encoder, TextEncoding(max_length=77, width=96))


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
