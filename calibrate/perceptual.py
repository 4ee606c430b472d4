"""Measures that need trained networks: LPIPS, FID's features, CLIP score. Weights are read from this machine alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..runtime.backends.buffers import one_line
from ..runtime.errors import TandemError
from .quality import Float32, Pixels

if TYPE_CHECKING:
    import torch


ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
CLIP = "openai/clip-vit-large-patch14"
_INSTALL = (
    'Install it: pip install "tandemrt[quality]"; on a CPU first pip install torch torchvision --index-url '
    "https://download.pytorch.org/whl/cpu, else PyPI's CUDA build replaces torch."
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Distance = Callable[[Pixels, Pixels], float]
Extractor = Callable[[Pixels], Float32]
Likeness = Callable[[Sequence[str], Sequence[Pixels]], tuple[float, ...]]


def lpips_distance() -> Distance:
    """LPIPS of two pictures, (H, W, 3) uint8, by AlexNet's features, version 0.1: 0 for equal ones.

    Zhang et al. 2018, through their package `lpips`, which brings all but AlexNet's weights.

    Raises:
        TandemError: the package cannot be imported, or the weights are not here.
    """
    with _importing("lpips"):
        import lpips  # noqa: PLC0415
        import torch  # noqa: PLC0415
    path = _require_weights("lpips", ALEXNET, ALEXNET_URL)
    with warnings.catch_warnings(), _reading(path):
        warnings.simplefilter("ignore")  # of torchvision, whose older arguments the package gives
        network = lpips.LPIPS(net="alex", verbose=False)

    def distance(picture: Pixels, reference: Pixels) -> float:
        pair = torch.from_numpy(np.stack([picture, reference])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            return float(network(pair[:1], pair[1:]))

    return distance


def inception_features(weights: Path | None = None) -> Extractor:
    """What FID compares: features (B, F) float32 of pictures (B, H, W, 3) uint8.

    weights: by its suffix: `.pth`, Inception's weights as torch-fidelity publishes them, which resizes pictures as
        TensorFlow 1 did (Heusel et al. 2017); `.pt`, a TorchScript module such as StyleGAN's authors publish; `.onnx`,
        any network with one input. These two are given (B, 3, H, W) float32 in 0..255, pictures as they are. Without
        it, torch-fidelity's weights in torch's folder for them.

    Raises:
        TandemError: a package cannot be imported, or the weights are not here or no such file.
    """
    if weights is not None and not weights.is_file():
        raise TandemError(f"--inception {weights}", "no such file", remedy="Check the path.")
    kind = ".pth" if weights is None else weights.suffix
    if kind not in _EXTRACTORS:
        expected = f"a file of {', '.join(_EXTRACTORS)}"
        raise TandemError(f"--inception {weights}", "cannot be told what it is by its suffix", expected=expected)
    return _EXTRACTORS[kind](weights)


def clip_likeness(folder: Path | None = None) -> Likeness:
    """CLIP score of prompts and their pictures, (H, W, 3) uint8 each: 100 times the cosine of their embeddings, from 0.

    Hessel et al. 2021, with 100 for their factor 2.5, as tables of text-to-image models have it. By default of
    ViT-L/14; prompts are cut after 77 tokens. NaN where the model makes none of a prompt and its picture.

    folder: a CLIP model as transformers saves one, with its tokenizer.

    Raises:
        TandemError: a package cannot be imported, or the model is not here.
    """
    with _importing("clip"):
        import torch  # noqa: PLC0415
        from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415
        from transformers import AutoTokenizer, CLIPModel  # noqa: PLC0415
    source = CLIP if folder is None else str(folder)
    try:
        model = CLIPModel.from_pretrained(source, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        where = f"Hugging Face's folder {HF_HUB_CACHE}" if folder is None else str(folder)
        remedy = f"Fetch it where there is a network: hf download {CLIP}; or give --clip DIR, a folder with the model."
        raise TandemError("clip", f"the model {source} is not in {where}", remedy=remedy) from error
    side = int(model.config.vision_config.image_size)

    def likeness(prompts: Sequence[str], pictures: Sequence[Pixels]) -> tuple[float, ...]:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = torch.from_numpy(np.stack([clip_pixels(picture, side) for picture in pictures]))
        with torch.inference_mode():
            found = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        cosines = (found.text_embeds * found.image_embeds).sum(dim=-1)
        return tuple((100 * cosines).clamp(min=0).tolist())

    return likeness


def clip_pixels(picture: Pixels, side: int) -> Float32:
    """A picture as CLIP reads it: shorter side resized to `side`, the middle, normalized: (3, side, side) float32."""
    height, width = picture.shape[:2]
    shorter = min(height, width)
    size = (width * side // shorter, height * side // shorter)
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    top, left = (resized.height - side) // 2, (resized.width - side) // 2
    middle = np.asarray(resized)[top : top + side, left : left + side]
    pixels: Float32 = ((middle / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32).transpose(2, 0, 1)
    return pixels


def _torch_fidelity(weights: Path | None) -> Extractor:
    with _importing("fid"):
        import torch  # noqa: PLC0415
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: PLC0415
    path = _require_weights("fid", INCEPTION, INCEPTION_URL, option="--inception") if weights is None else weights
    with _reading(path):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))

    def extract(pictures: Pixels) -> Float32:
        with torch.inference_mode():
            (features,) = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        return _array(features)

    return extract


def _torchscript(weights: Path) -> Extractor:
    with _importing("fid"):
        import torch  # noqa: PLC0415
    with _reading(weights):
        network = torch.jit.load(str(weights), map_location="cpu").eval()

    # The module of StyleGAN's authors classifies unless it is told otherwise.
    told = {"return_features": True} if "return_features" in str(network.forward.schema) else {}

    def extract(pictures: Pixels) -> Float32:
        with torch.inference_mode():
            return _array(network(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), **told))

    return extract


def _onnx(weights: Path) -> Extractor:
    with _importing("fid"):
        import onnxruntime  # noqa: PLC0415
    with _reading(weights):
        session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

    def extract(pictures: Pixels) -> Float32:
        features: Float32 = session.run(None, {given.name: pictures.transpose(0, 3, 1, 2).astype(np.float32)})[0]
        return features.reshape(len(pictures), -1)

    return extract


_EXTRACTORS: dict[str, Callable[[Any], Extractor]] = {".pth": _torch_fidelity, ".pt": _torchscript, ".onnx": _onnx}


def _array(features: torch.Tensor) -> Float32:
    array: Float32 = features.float().numpy().reshape(len(features), -1)
    return array


@contextmanager
def _importing(measure: str) -> Iterator[None]:
    """Tell which package a measure lacks; a torchvision of another build than torch's fails in ways of its own."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        if name := getattr(error, "name", None):
            raise TandemError(measure, f"needs {name}, which cannot be imported here", remedy=_INSTALL) from error
        what, remedy = f"its packages cannot be imported ({error})", f"{_INSTALL} torchvision has to be of torch's own."
        raise TandemError(measure, what, remedy=remedy) from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch's and ONNX Runtime's errors of damaged files have no common class
        what = f"cannot be read as a network ({one_line(error)})"
        raise TandemError(str(path), what, remedy="Fetch it again.") from error


def _require_weights(measure: str, name: str, url: str, option: str = "") -> Path:
    """Where torch keeps the weights of that name; TandemError where it does not."""
    import torch  # noqa: PLC0415

    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        other = f", or give {option} FILE" if option else ""
        remedy = f"Fetch {url} where there is a network, and put it there{other}."
        raise TandemError(measure, f"the weights {path} are not here", remedy=remedy)
    return path
