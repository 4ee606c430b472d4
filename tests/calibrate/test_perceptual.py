"""Measures by trained networks, with networks of random weights in the files' own forms; what is told without them."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tandemrt.calibrate import perceptual
from tandemrt.calibrate.perceptual import clip_likeness, clip_pixels, inception_features, lpips_distance
from tandemrt.runtime.errors import TandemError

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 70, 80, 3), dtype=np.uint8)


def means_of_rows(batch: int | str = "B", factor: float = 2) -> onnx.ModelProto:
    """Features (B, 3 H) of pictures (B, 3, H, W): the mean of each row, times `factor`."""
    nodes = [
        helper.make_node("ReduceMean", ["pictures", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "factor"], ["features"]),
    ]
    given = helper.make_tensor_value_info("pictures", TensorProto.FLOAT, [batch, 3, "H", "W"])
    made = helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, 3, "H"])
    constants = {"axes": np.array([3]), "factor": np.float32(factor)}
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "means", [given], [made], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


EXPECTED = 2 * PICTURES.transpose(0, 3, 1, 2).astype(np.float64).mean(axis=3).reshape(3, -1)


def test_features_of_an_onnx_graph(tmp_path: Path) -> None:
    onnx.save(means_of_rows(), tmp_path / "means.onnx")
    np.testing.assert_allclose(inception_features(tmp_path / "means.onnx")(PICTURES), EXPECTED, rtol=1e-5)


class Plain(torch.nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return 2 * pictures.mean(dim=3)


class Detector(torch.nn.Module):
    """As StyleGAN's authors publish theirs: it classifies unless it is asked for features."""

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return 2 * pictures.mean(dim=3) if return_features else pictures[:, 0, 0, :1]


@pytest.mark.parametrize("module", [Plain(), Detector()])
def test_features_of_a_torchscript_module(module: torch.nn.Module, tmp_path: Path) -> None:
    torch.jit.script(module).save(str(tmp_path / "module.pt"))
    np.testing.assert_allclose(inception_features(tmp_path / "module.pt")(PICTURES), EXPECTED, rtol=1e-5)


def test_a_file_that_is_no_network_is_told(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"--inception .*none.onnx: no such file"):
        inception_features(tmp_path / "none.onnx")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(TandemError, match=r"by its suffix, expected a file of .pth, .pt, .onnx"):
        inception_features(tmp_path / "weights.bin")
    for suffix in ("onnx", "pt"):
        (tmp_path / f"damaged.{suffix}").write_bytes(b"nothing")
        with pytest.raises(TandemError, match=rf"damaged.{suffix}: cannot be read as a network"):
            inception_features(tmp_path / f"damaged.{suffix}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch looks for weights, in a folder of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("measure", "package"), [(lpips_distance, "lpips"), (inception_features, "torch_fidelity")], ids=["lpips", "fid"]
)
def test_a_package_that_is_missing_is_named(measure: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        TandemError, match=rf'needs {package}\S*, .*Install it: pip install "tandemrt\[quality\]"'
    ) as told:
        measure()
    # As for torch itself in the README: PyPI's torchvision would bring PyPI's torch.
    assert "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" in str(told.value)


def test_weights_that_are_missing_are_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, the folder, and where it is to be had."""
    stand_in(monkeypatch, "lpips", LPIPS=None)
    stand_in(monkeypatch, "torch_fidelity")
    stand_in(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3", FeatureExtractorInceptionV3=None)
    with pytest.raises(TandemError) as told:
        lpips_distance()
    assert f"lpips: the weights {hub / 'alexnet-owt-7be5be79.pth'} are not here" in str(told.value)
    assert "Fetch https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in str(told.value)
    with pytest.raises(TandemError) as told:
        inception_features()
    assert f"fid: the weights {hub / perceptual.INCEPTION} are not here" in str(told.value)
    assert f"Fetch {perceptual.INCEPTION_URL}" in str(told.value)
    assert "or give --inception FILE" in str(told.value)


def test_lpips_is_given_pairs_from_minus_one_to_one(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub / perceptual.ALEXNET).touch()
    stand_in(monkeypatch, "lpips", LPIPS=lambda **_: lambda one, other: (one - other).abs().amax(dim=(1, 2, 3)))
    distance = lpips_distance()
    black, white = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert distance(black, white) == pytest.approx(2)
    assert distance(white, white) == 0


def test_torch_fidelity_is_given_bytes(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extractor(name: str, features: list[str], feature_extractor_weights_path: str) -> Any:
        assert (features, feature_extractor_weights_path) == (["2048"], str(hub / perceptual.INCEPTION))
        return lambda pictures: (pictures.double().mul(2).mean(dim=3) * (pictures.dtype == torch.uint8),)

    (hub / perceptual.INCEPTION).touch()
    stand_in(monkeypatch, "torch_fidelity")
    stand_in(monkeypatch, "torch_fidelity.feature_extractor_inceptionv3", FeatureExtractorInceptionV3=extractor)
    np.testing.assert_allclose(inception_features()(PICTURES), EXPECTED, rtol=1e-5)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_clip_scores_are_cosines_of_embeddings(clip_folder: Path) -> None:
    """As transformers' own logits have them, without their scale; prompts that are too long are cut."""
    from transformers import CLIPModel  # noqa: PLC0415 (seconds)

    prompts = ["a red circle", "blue", "a red square " * 40]
    scores = clip_likeness(clip_folder)(prompts, PICTURES)
    model = CLIPModel.from_pretrained(clip_folder)
    words = {"a": 6, "red": 2, "circle": 4, "square": 5, "blue": 3}
    for prompt, picture, score in zip(prompts, PICTURES, scores, strict=True):
        tokens = torch.tensor([[0, *[words[word] for word in prompt.split()][:75], 1]])
        pixels = torch.from_numpy(clip_pixels(picture, 32)[None])
        with torch.inference_mode():
            cosine = float(model(input_ids=tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp())
        assert score == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
    assert len(set(scores)) > 1


def test_a_clip_that_makes_nothing_of_a_picture_says_so(clip_folder: Path, tmp_path: Path) -> None:
    """NaN is no score of 0."""
    from transformers import CLIPModel  # noqa: PLC0415 (seconds)

    shutil.copytree(clip_folder, tmp_path / "clip")
    model = CLIPModel.from_pretrained(clip_folder)
    torch.nn.init.constant_(model.visual_projection.weight, math.nan)
    model.save_pretrained(tmp_path / "clip")
    assert np.isnan(clip_likeness(tmp_path / "clip")(["a red circle"], PICTURES[:1])).all()


@pytest.mark.parametrize("size", [(70, 80), (64, 64), (512, 300), (440, 440), (1136, 760)])
def test_clip_reads_pictures_as_transformers_prepares_them(size: tuple[int, int]) -> None:
    from transformers.models.clip import image_processing_pil_clip  # noqa: PLC0415 (seconds)

    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = image_processing_pil_clip.CLIPImageProcessorPil()
    expected = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(clip_pixels(picture, 224), expected, atol=1e-5)


def test_a_clip_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TandemError) as told:
        clip_likeness()
    assert "clip: the model openai/clip-vit-large-patch14 is not in Hugging Face's folder " in str(told.value)
    assert "hf download openai/clip-vit-large-patch14; or give --clip DIR" in str(told.value)
    with pytest.raises(TandemError, match=f"clip: the model {tmp_path} is not in {tmp_path}"):
        clip_likeness(tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize("measure", [lpips_distance, inception_features], ids=["lpips", "fid"])
def test_the_packages_themselves(measure: Any, hub: Path) -> None:
    """With random weights in their own files where the extra `quality` is installed, and a sentence where it is not."""
    if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(TandemError, match=r'Install it: pip install "tandemrt\[quality\]"'):
            measure()
        return
    import torch_fidelity.feature_extractor_inceptionv3 as inception  # noqa: PLC0415
    import torchvision  # noqa: PLC0415

    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), hub / perceptual.ALEXNET)
    blank = SimpleNamespace(load_state_dict_from_url=lambda *_, **__: {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", blank.load_state_dict_from_url)
        patched.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = inception.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), hub / perceptual.INCEPTION)
    if measure is lpips_distance:
        distance = lpips_distance()
        assert distance(PICTURES[0], PICTURES[0]) == 0
        assert distance(PICTURES[0], PICTURES[1]) > 0
    else:
        assert inception_features()(PICTURES).shape == (3, 2048)
