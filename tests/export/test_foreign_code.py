"""Checkpoints that bring code along: refused where they ask for it, and nothing of theirs is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.runtime.errors import CheckpointError

from .mini import edit_json
from .test_controlnets import write_controlnet

STRIKE = "from pathlib import Path\nPath(__file__).with_name('struck').touch()\n"
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


def test_scripts_that_nothing_asks_for_are_passed_over_and_not_run(own_checkpoint: Path, tmp_path: Path) -> None:
    """ControlNets are published with the scripts of their training; two names are those that diffusers looks for."""
    controlnet = write_controlnet(tmp_path / "controlnet")
    holders = own_checkpoint, *(own_checkpoint / name for name in ("unet", "vae", "text_encoder", "tokenizer"))
    for folder in (*holders, controlnet):
        for name in ("pipeline", "diffusers", "transformers", "train"):
            (folder / f"{name}.py").write_text(STRIKE)
    export_bundle(ExportPlan(own_checkpoint, tmp_path / "out", (Added("controlnet_edges", controlnet),)))
    assert not list(tmp_path.rglob("struck"))
