"""Whole exports: what a bundle holds, and what is left when one fails or is killed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from onnxscript import ir
from transformers import CLIPTextModel, CLIPTokenizer

from tandemrt.bench.shapes.bundle import WEIGHTS
from tandemrt.export import bundle as bundles
from tandemrt.export.bundle import export_bundle
from tandemrt.export.jobs import jobs
from tandemrt.export.parity import THRESHOLDS
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.verify import verify_bundle
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import CheckpointError, ExportError
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.staging import _PART

from .mini import edit_json

pytestmark = pytest.mark.slow

DENOISERS = ("unet", "unet_small", "unet_one_step")
DECODERS = ("vae_decoder", "vae_decoder_small", "vae_decoder_tiny")
EXPORTER = """
import sys
from pathlib import Path
from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import ExportPlan
plan = ExportPlan(Path(sys.argv[1]), Path(sys.argv[2]), dtype="fp16", force=True)
export_bundle(plan, lambda message, done, total: print(message, flush=True))
"""


@pytest.fixture(scope="module")
def manifest(shapes_bundle: Path) -> Manifest:
    return Bundle.open(shapes_bundle).manifest


def test_the_shapes_family_makes_a_whole_bundle(manifest: Manifest) -> None:
    assert manifest.names("denoiser") == DENOISERS
    assert manifest.names("vae_decoder") == DECODERS
    assert manifest.names("text_encoder") == ("text_encoder",)
    assert manifest.names("vae_encoder") == ("vae_encoder",)
    assert (manifest.text.max_length, manifest.text.width) == (24, 128)
    assert (manifest.latent.channels, manifest.latent.downsampling, manifest.latent.scaling_factor) == (4, 8, 1.0)
    assert (manifest.defaults.height, manifest.defaults.width) == (64, 64)
    assert manifest.defaults.num_inference_steps == 25
    assert manifest.scheduler.class_name == "DPMSolverMultistepScheduler"
    assert {"tandemrt", "torch", "diffusers", "transformers", "onnxruntime"} <= manifest.producers.keys()


def test_what_the_manifest_says_of_graphs_is_true(shapes_bundle: Path, manifest: Manifest) -> None:
    kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    for component in manifest.components.values():
        session = onnxruntime.InferenceSession(shapes_bundle / component.model, providers=["CPUExecutionProvider"])
        for specs, values in ((component.inputs, session.get_inputs()), (component.outputs, session.get_outputs())):
            assert [(spec.name, list(spec.shape), kinds[spec.dtype]) for spec in specs] == [
                (value.name, value.shape, value.type) for value in values
            ]
    weights = onnx.load(shapes_bundle / "unet" / "model.onnx").graph.initializer
    exported = sum(int(np.prod(tensor.dims)) for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT)
    assert exported == pytest.approx(manifest.components["unet"].parameters, rel=0.01)


def test_evidence_covers_three_shapes_and_two_batches(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        for axes in ("input_ids", "sample", "latent_sample", "encoder_hidden_states"):
            shapes = {each.input_shapes[axes] for each in component.evidence if axes in each.input_shapes}
            assert len({shape[2:] if len(shape) == 4 else shape[1:] for shape in shapes}) in (0, 3), name
            assert not shapes or len({shape[0] for shape in shapes}) == 2, name
        assert all(0 < each.value <= each.threshold == THRESHOLDS["fp32"] for each in component.evidence), name


def test_only_denoisers_carry_a_denoisers_facts(manifest: Manifest) -> None:
    for name, component in manifest.components.items():
        denoiser = name in DENOISERS
        assert component.prediction_type == ("epsilon" if denoiser else None)
        assert component.spatial_multiple == (2 if denoiser else 1)
        assert component.scheduler is None or denoiser


def test_decoders_and_encoder_agree_with_diffusers(shapes_bundle: Path) -> None:
    """Against the stock classes' public methods, which the export's own wrappers stand in for."""
    latent = np.random.default_rng(5).standard_normal((2, 4, 6, 10)).astype(np.float32)
    picture = np.random.default_rng(6).uniform(-1, 1, (1, 3, 48, 64)).astype(np.float32)
    kl = AutoencoderKL.from_pretrained(WEIGHTS / "large" / "vae", torch_dtype=torch.float32)
    tiny = AutoencoderTiny.from_pretrained(WEIGHTS / "vae_tiny", torch_dtype=torch.float32)
    with torch.inference_mode():
        expected = {
            "vae_decoder": kl.decode(torch.from_numpy(latent)).sample,
            "vae_decoder_tiny": tiny.decode(torch.from_numpy(latent)).sample,
            "vae_encoder": kl.encode(torch.from_numpy(picture)).latent_dist.parameters,
        }
    for name, value in expected.items():
        given = {"sample": picture} if name == "vae_encoder" else {"latent_sample": latent}
        found = _run(shapes_bundle / name, given)[0]
        np.testing.assert_allclose(found, value.numpy(), atol=1e-4 * float(value.abs().max()))


def test_the_text_encoder_agrees_with_transformers(shapes_bundle: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(shapes_bundle / "tokenizer")
    text = CLIPTextModel.from_pretrained(WEIGHTS / "large" / "text_encoder", dtype=torch.float32)
    ids = tokenizer(["a red ring above a cyan star", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = text(ids)
    hidden, pooled = _run(shapes_bundle / "text_encoder", {"input_ids": ids.numpy()})
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), atol=1e-4)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=1e-4)


def test_the_layout_is_the_one_optimum_reads(shapes_bundle: Path) -> None:
    index = json.loads((shapes_bundle / "model_index.json").read_bytes())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    for name in (*DENOISERS, *DECODERS, "vae_encoder", "text_encoder"):
        assert (shapes_bundle / name / "config.json").is_file()
    assert json.loads((shapes_bundle / "unet" / "config.json").read_bytes())["time_cond_proj_dim"] is None


def test_a_bundle_is_verified_against_its_sources(
    shapes_bundle: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["--checkpoint", str(WEIGHTS / "large"), "--small", str(WEIGHTS / "small")]
    assert main(["verify", str(shapes_bundle), *sources, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["parity"]) == {"text_encoder", "unet", "unet_small", "vae_decoder", "vae_encoder"}
    assert found["parity_not_checked"] == ["unet_one_step", "vae_decoder_small", "vae_decoder_tiny"]
    for name, evidence in found["parity"].items():
        # The same inputs again; floating point may differ with the number of threads.
        assert [each["input_shapes"] for each in evidence] == [
            {key: list(shape) for key, shape in each.input_shapes.items()}
            for each in manifest.components[name].evidence
        ]
        assert all(0 < each["value"] <= each["threshold"] == THRESHOLDS["fp32"] for each in evidence)


def test_another_source_than_the_bundles_is_refused(shapes_bundle: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unet_small: .*not what the component was exported from"):
        added = (Added("unet_small", WEIGHTS / "one_step"),)
        verify_bundle(Bundle.open(shapes_bundle), ExportPlan(WEIGHTS / "large", shapes_bundle, added))


def test_half_precision_is_listed_and_smaller(half_bundle: Path) -> None:
    manifest = Bundle.open(half_bundle).manifest
    for name, component in manifest.components.items():
        names = {node.name for node in onnx.load(half_bundle / component.model).graph.node}
        assert component.precision == "fp16"
        assert set(component.fp32_islands) <= names
        assert all(each.threshold == THRESHOLDS["fp16"] for each in component.evidence), name
    islands = manifest.components["unet"].fp32_islands
    assert "down_blocks.0.resnets.0.norm1/InstanceNormalization" in islands
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1/Softmax" in islands
    assert "time_proj/Sin" in islands
    assert not any("Conv" in name or "MatMul" in name for name in islands)
    assert manifest.latent.scaling_factor == 0.18215


def test_a_half_precision_export_writes_nowhere_but_beside_its_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(bundles, "jobs", lambda sources: [job for job in jobs(sources) if job.name == "vae_decoder"])
    out = export_bundle(ExportPlan(checkpoint, tmp_path / "out", dtype="fp16"))
    assert list(tmp_path.iterdir()) == [out]


def test_a_defect_between_export_and_verification_publishes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bundles.write_model

    def write_wrong(model: ir.Model, folder: Path) -> Path:
        path = write(model, folder)
        damaged = onnx.load(path)
        for weight in (
            each
            for each in damaged.graph.initializer
            if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) == 2
        ):
            values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(damaged, path)
        return path

    monkeypatch.setattr(bundles, "write_model", write_wrong)
    with pytest.raises(ExportError, match=r"text_encoder: \w+: max_relative_error to PyTorch at .*input_ids.*0\.0001"):
        export_bundle(ExportPlan(checkpoint, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_exporting_is_one_line_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: ir.Model, folder: Path) -> Path:
        (folder / "model.onnx").write_bytes(b"half a model")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.onnx"))

    monkeypatch.setattr(bundles, "write_model", full)
    with pytest.raises(ExportError, match=r"model\.onnx: cannot be written \(No space left on device\)\. Free space"):
        export_bundle(ExportPlan(checkpoint, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_with_the_tokenizer_is_one_line(checkpoint: Path, half_bundle: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in (checkpoint / "tokenizer").iterdir())
    written = (half_bundle / "tokenizer" / "tokenizer.json").stat().st_size
    assert largest < written - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (written - 1, hard))
    try:
        with pytest.raises(ExportError, match=r"out: cannot be written \(File too large\)"):
            export_bundle(ExportPlan(checkpoint, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_runtime_for_gpus_is_recorded_under_its_own_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3" if name == "onnxruntime-gpu" else metadata.version(name)

    monkeypatch.setattr(bundles, "version", installed)
    _stand_in_for_graphs(tmp_path, monkeypatch)
    producers = Bundle.open(export_bundle(ExportPlan(checkpoint, tmp_path / "out"))).manifest.producers
    assert producers["onnxruntime-gpu"] == "1.2.3"
    assert "onnxruntime" not in producers


def test_a_package_that_is_not_installed_is_noticed_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(bundles, "version", installed)
    monkeypatch.setattr(bundles, "export_tokenizer", lambda *_: pytest.fail("work was done"))
    with pytest.raises(metadata.PackageNotFoundError):
        export_bundle(ExportPlan(checkpoint, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_out_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exists already"):
        export_bundle(ExportPlan(Path("no such checkpoint"), tmp_path))


def test_a_killed_export_leaves_the_old_bundle_and_is_swept(
    checkpoint: Path, half_bundle: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(half_bundle, tmp_path / "out"))
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", EXPORTER, str(checkpoint), str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("text_encoder: verify"):
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert Bundle.open(out).digest == Bundle.open(half_bundle).digest
    assert len([path for path in tmp_path.iterdir() if _PART in path.name]) == 1
    (Path(shutil.copytree(checkpoint, tmp_path / "broken")) / "tokenizer" / "vocab.json").write_text("[]")
    with pytest.raises(CheckpointError):
        export_bundle(ExportPlan(tmp_path / "broken", tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]


def test_a_denoisers_own_scheduler_and_the_defaults_are_recorded(
    checkpoint: Path, tiny: Path, own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifest says of parts; the graphs themselves are stood in for."""
    edit_json(own_checkpoint / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    added = (Added("unet_one", own_checkpoint), Added("unet_same", checkpoint), Added("vae_decoder_tiny", tiny))
    _stand_in_for_graphs(tmp_path, monkeypatch)
    plan = ExportPlan(checkpoint, tmp_path / "out", added, guidance_scale=2.0, num_inference_steps=8)
    seen: list[tuple[str, int, int]] = []
    manifest = Bundle.open(export_bundle(plan, lambda *step: seen.append(step))).manifest
    own = manifest.components["unet_one"].scheduler
    assert own is not None
    assert own.config["timestep_spacing"] == "trailing"
    assert manifest.components["unet_same"].scheduler is None
    assert (manifest.defaults.guidance_scale, manifest.defaults.num_inference_steps) == (2.0, 8)
    assert (manifest.defaults.height, manifest.defaults.width) == (16, 16)
    total = 3 * len(manifest.components) + 1
    assert [done for _, done, _ in seen] == list(range(total + 1))
    assert {of for _, _, of in seen} == {total}


def _stand_in_for_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.load(tmp_path_model(folder))
    monkeypatch.setattr(bundles, "onnx_from_module", lambda name, graph: model)
    monkeypatch.setattr(bundles, "compare", lambda *_: ())
    monkeypatch.setattr(bundles, "require_close", lambda *_: None)


def tmp_path_model(folder: Path) -> Path:
    """The smallest ONNX file there is."""
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), folder / "empty.onnx")
    return folder / "empty.onnx"


def _run(folder: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs
