"""Checkpoints that bring code along: refused by name, and nothing of theirs is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.runtime.errors import CheckpointError

from .mini import edit_json

STRIKE = "from pathlib import Path\nPath(__file__).with_name('struck').touch()\n"
BRINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipeline of its own": (
        lambda c: (c / "pipeline.py").write_text(STRIKE),
        r"pipeline\.py: code in a checkpoint, which is never run",
    ),
    "a model of its own": (
        lambda c: (
            (c / "unet" / "my_unet.py").write_text(STRIKE),
            edit_json(c / "model_index.json", unet=["my_unet", "MyUNet"]),
        ),
        r"unet: library, got 'my_unet', expected diffusers",
    ),
    "a file beside a model": (
        lambda c: (c / "unet" / "my_unet.py").write_text(STRIKE),
        r"unet/my_unet\.py: code in a checkpoint",
    ),
    "a pipeline class in a module": (
        lambda c: edit_json(c / "model_index.json", _class_name=["pipeline", "MyPipeline"]),
        r"model_index\.json: _class_name: asks for code of the checkpoint's own, which is never run, got \['pipeline'",
    ),
    "a model class in a module": (
        lambda c: edit_json(c / "vae" / "config.json", _class_name=["my_vae", "AutoencoderKL"]),
        r"vae/config\.json: _class_name: asks for code of the checkpoint's own",
    ),
    "transformers' map to code": (
        lambda c: edit_json(c / "text_encoder" / "config.json", auto_map={"AutoModel": "my_text.MyText"}),
        r"text_encoder/config\.json: auto_map: asks for code",
    ),
    "diffusers' map to code": (
        lambda c: edit_json(c / "unet" / "config.json", auto_map={"AutoModel": "someone/else--my_unet.MyUNet"}),
        r"unet/config\.json: auto_map: asks for code",
    ),
    "a module where a component is ignored otherwise": (
        lambda c: edit_json(c / "model_index.json", upscaler=["my_upscaler", "Upscaler"]),
        "component that is not supported, got 'upscaler'",
    ),
}


@pytest.mark.parametrize("what", BRINGS)
def test_code_in_a_checkpoint_is_refused_and_not_run(what: str, own_checkpoint: Path, tmp_path: Path) -> None:
    bring, complaint = BRINGS[what]
    bring(own_checkpoint)
    with pytest.raises(CheckpointError, match=complaint):
        export_bundle(ExportPlan(own_checkpoint, tmp_path / "out"))
    assert not list(tmp_path.rglob("struck"))
    assert not (tmp_path / "out").exists()


def test_code_beside_an_added_denoiser_is_refused(checkpoint: Path, own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "unet" / "my_unet.py").write_text(STRIKE)
    with pytest.raises(CheckpointError, match=r"my_unet\.py: code in a checkpoint"):
        export_bundle(ExportPlan(checkpoint, tmp_path / "out", (Added("unet_small", own_checkpoint),)))
