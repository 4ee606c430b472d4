"""The trained family on every backend that builds here, in fp32 and in fp16."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
from onnxscript import ir

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import BuildPlan, requests_of
from tandemrt.export.audit import find_islands
from tandemrt.export.graph import save
from tandemrt.export.half import half_from_float
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.engine_session import EngineSession, Loader
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.targets import Target

from ..interop.picture import psnr_db
from ..runtime.test_backend_openvino import HAS_BF16
from ..runtime.tiny_bundle import resign
from .families import painted, random_inputs, require_engines

PAINTING = ("text_encoder", "unet", "vae_decoder")
HALF_TARGETS = (
    Target("onnxruntime", "cpu", "fp16"),
    Target("openvino", "cpu", "fp16"),
    *([Target("openvino", "cpu", "bf16")] if HAS_BF16 else []),
)
# Of the picture to that of the fp32 bundle on ONNX Runtime.
MINIMUM_HALF_PSNR_DB = 35.0


@pytest.mark.slow
def test_the_shapes_family_builds_on_every_backend(shapes_bundle: Path, tmp_path: Path) -> None:
    components = ("text_encoder", "unet_small", "vae_decoder_tiny", "vae_encoder")
    require_engines(Bundle.open(shapes_bundle), tmp_path, components)


def in_half_precision(bundle: Bundle, folder: Path) -> Bundle:
    """What an export with --dtype fp16 makes of the same weights, without the seconds that torch takes for it."""
    shutil.copytree(bundle.path, folder)
    plan = BuildPlan(bundle.path, (Target("onnxruntime", "cpu"),), folder, PAINTING)
    for request in requests_of(plan, bundle):
        model = ir.load(request.model)
        half_from_float(model, find_islands(model, [random_inputs(request, bundle)], folder.parent))
        save(model, folder / request.component)

    def stated(manifest: Manifest) -> Manifest:
        half = {name: msgspec.structs.replace(manifest.components[name], precision="fp16") for name in PAINTING}
        return msgspec.structs.replace(manifest, components=half)

    for name in set(bundle.manifest.components) - set(PAINTING):
        shutil.rmtree(folder / name)
    resign(folder, stated)
    return Bundle.open(folder)


@pytest.mark.slow
def test_a_bundle_in_fp16_paints_the_picture_of_the_one_in_fp32(shapes_bundle: Path, tmp_path: Path) -> None:
    half = in_half_precision(Bundle.open(shapes_bundle), tmp_path / "half")
    for request in requests_of(BuildPlan(half.path, HALF_TARGETS, tmp_path / "cache"), half):
        ensure_engine(request, tmp_path / "cache", lambda label, done, total: None, {})
    with mock.patch.dict(os.environ, TANDEMRT_CACHE=os.devnull):
        expected = painted(Bundle.open(shapes_bundle), "onnxruntime:cpu:fp32")
    with mock.patch.dict(os.environ, TANDEMRT_CACHE=str(tmp_path / "cache")):
        for target in HALF_TARGETS:
            for name in PAINTING:
                assert isinstance(Loader(half, name, target, 1).session(), EngineSession)
            found = painted(half, str(target))
            assert not np.array_equal(found, expected)
            assert psnr_db(found, expected) >= MINIMUM_HALF_PSNR_DB, target
