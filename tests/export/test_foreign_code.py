"""Checkpoints that bring code along: refused where they ask for it, and nothing of theirs is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import ExportPlan
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import CheckpointError

from .mini import edit_json
from .steered import STRIKE

BRINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model of its own": (
        lambda c: (
            (c / "unet" / "my_unet.py").write_text(STRIKE),
            edit_json(c / "model_index.json", unet=["my_unet", "MyUNet"]),
        ),
        r"unet: library, got 'my_unet', expected diffusers",
    ),
    "a pipeline class in a module": (
        lambda c: (
            (c / "pipeline.py").write_text(STRIKE),
            edit_json(c / "model_index.json", _class_name=["pipeline", "MyPipeline"]),
        ),
        r"model_index\.json: _class_name: asks for code of the checkpoint's own, which is never run, got \['pipeline'",
    ),
    "a model class in a module": (
        lambda c: (
            (c / "vae" / "my_vae.py").write_text(STRIKE),
            edit_json(c / "vae" / "config.json", _class_name=["my_vae", "AutoencoderKL"]),
        ),
        r"vae/config\.json: _class_name: asks for code of the checkpoint's own",
    ),
    "transformers' map to code": (
        lambda c: (
            (c / "text_encoder" / "my_text.py").write_text(STRIKE),
            edit_json(c / "text_encoder" / "config.json", auto_map={"AutoModel": "my_text.MyText"}),
        ),
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


def test_scripts_that_nothing_asks_for_are_passed_over_and_not_run(steered: Path) -> None:
    assert len(list(steered.glob("*/train.py"))) == 3
    assert Bundle.open(steered / "bundle").manifest.names("controlnet")
    assert not list(steered.rglob("struck"))
