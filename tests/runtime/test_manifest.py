"""The manifest: what is written reads back, and what is foreign is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandemrt.runtime import manifest as module
from tandemrt.runtime.errors import BundleError
from tandemrt.runtime.files import file_sha256
from tandemrt.runtime.manifest import Evidence, FileRecord, Loss, Quantization, TensorSpec, json_schema
from tandemrt.runtime.manifest_checks import check_manifest
from tandemrt.runtime.manifest_files import decode, encode

from .test_plan import MANIFEST
from .tiny_bundle import write_tiny_bundle

FULL = msgspec.structs.replace(
    MANIFEST,
    producers={"tandemrt": "0.1.0"},
    files={"unet/model.onnx": FileRecord(size=3, sha256="ab" * 32)},
    components={
        "unet": msgspec.structs.replace(
            MANIFEST.components["unet"],
            inputs=(TensorSpec(name="sample", dtype="float32", shape=("batch", 4, "height", "width")),),
            fp32_islands=("mid_block.norm",),
            evidence=(
                Evidence(
                    metric="max_relative_error", value=1e-6, threshold=1e-4, input_shapes={"sample": (1, 4, 8, 8)}
                ),
            ),
        )
    },
)


QUANTIZED = Quantization(
    format="int8",
    tool="tandemrt",
    version="0.1.0",
    settings={"observer": "mse", "smoothing": 0.5},
    layers=2,
    kept=("conv_out/Conv",),
    float_model="ab" * 32,
    trajectories="cd" * 32,
    losses=(
        Loss(psnr_db=38.5, worst_psnr_db=35.0, ssim=0.99, latent_error=0.01, min_psnr_db=30.0, bundle="ef" * 32,
             prompts=8, prompts_sha256="01" * 32, seed=64, painted="onnxruntime:cpu, unet 10"),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"psnr_db": 29.9}, False),
        ({"psnr_db": float("nan")}, False),
        ({"min_psnr_db": None, "psnr_db": 3.0}, True),
        ({"min_accuracy": 0.9, "accuracy": 0.8, "float_accuracy": 0.88}, True),
        ({"min_accuracy": 0.9, "accuracy": 0.79, "float_accuracy": 0.88}, False),
        ({"min_accuracy": 0.9}, False),
    ],
)
def test_a_loss_is_within_its_budget_or_not(changes: dict[str, Any], holds: bool) -> None:
    assert msgspec.structs.replace(QUANTIZED.losses[0], **changes).holds is holds


def test_what_is_written_reads_back() -> None:
    assert decode(encode(FULL), "tandem.json") == FULL
    quantized = msgspec.structs.replace(FULL.components["unet"], quantization=QUANTIZED)
    with_it = msgspec.structs.replace(FULL, components={"unet": quantized})
    assert decode(encode(with_it), "tandem.json") == with_it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "quantized layers of 'unet', got 0, expected 1 or more"),
        ({"float_model": "x"}, "quantization of 'unet': float_model, got 'x', expected 64 hexadecimal digits"),
        ({"trajectories": None}, "quantization of 'unet': int8 without trajectories"),
        (
            {"losses": (msgspec.structs.replace(QUANTIZED.losses[0], prompts=0),)},
            "'unet': loss 0, got .* of 0 prompts",
        ),
        ({"losses": (msgspec.structs.replace(QUANTIZED.losses[0], bundle=""),)}, "bundle of loss 0, got ''"),
    ],
)
def test_a_quantization_that_says_nothing_usable_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    manifest = write_tiny_bundle(tmp_path / "bundle")

    def quantized(quantization: Quantization) -> Any:
        unet = msgspec.structs.replace(manifest.components["unet"], quantization=quantization)
        return msgspec.structs.replace(manifest, components={**manifest.components, "unet": unet})

    check_manifest(quantized(QUANTIZED), "tandem.json")
    with pytest.raises(BundleError, match=words):
        check_manifest(quantized(msgspec.structs.replace(QUANTIZED, **changes)), "tandem.json")
    assert encode(FULL).endswith(b"}\n")


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(encode(FULL)), **changes}).encode()


COMPONENTS = json.loads(encode(FULL))["components"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a bundle manifest"),
        (b"\x89PNG", "not a bundle manifest"),
        (b"[" * 100_000, "not a bundle manifest"),
        (b"\xff\xfe{}", "not a bundle manifest"),
        (edited(format=2), "bundle format, got 2, expected 1. Upgrade tandemrt"),
        (edited(format=0), "got 0, expected 1. Export the bundle again"),
        (b"{}", "not a bundle manifest"),
        (edited(surprise=1), "surprise"),
        (edited(files=[]), r"\$.files"),
        (edited(latent={"channels": "4", "downsampling": 8, "scaling_factor": 1.0}), r"\$.latent.channels"),
        (
            edited(components={**COMPONENTS, "control": {**COMPONENTS["unet"], "role": "adapter"}}),
            r"'adapter' - at `\$\.components\['control'\]\.role`.*may come from a newer tandemrt: upgrade",
        ),
        (b'{"format": 1, "components": {"unet": 5}, "components": 3}', "not a bundle manifest"),
        (b" " * (4 << 20) + b"{}", "manifest size"),
    ],
)
def test_foreign_manifests_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(BundleError, match=words) as caught:
        decode(raw, "somewhere/tandem.json")
    assert str(caught.value).startswith("somewhere/tandem.json: ")
    assert "\n" not in str(caught.value)


def test_names_lists_components_of_a_role_in_order() -> None:
    assert MANIFEST.names("denoiser") == ("unet", "unet_small", "unet_one_step")
    assert MANIFEST.names("vae_encoder") == ()


def test_the_schema_in_the_repository_is_the_structs() -> None:
    kept = Path(module.__file__).with_name("tandem.schema.json")
    assert json.loads(kept.read_bytes()) == json.loads(msgspec.json.encode(json_schema()))


def test_file_sha256_reads_all_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
