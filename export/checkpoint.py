"""Checkpoints on disk: which folders make up a diffusers directory, and what their configurations say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.manifest import SchedulerDefaults
from ..runtime.safetensors_files import read_json
from .foreign_code import REMEDY, read_codeless_json
from .foreign_graph import is_foreign
from .weight_files import find_weights, read_weights
from .weights import Weights

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one kind of pipeline hold beside an autoencoder and a scheduler.

    denoiser: its component. text_encoders: their classes by component; a checkpoint may lack the `optional` ones.
    """

    denoiser: str
    text_encoders: Mapping[str, str]
    optional: frozenset[str] = frozenset()

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """The classes that a component may be of."""
        tokenizers = {tokenizer_of(name): TOKENIZERS[kind] for name, kind in self.text_encoders.items()}
        encoders = {name: (kind,) for name, kind in self.text_encoders.items()}
        return {self.denoiser: (DENOISERS[self.denoiser],), "vae": AUTOENCODERS, **encoders, **tokenizers}


def tokenizer_of(text_encoder: str) -> str:
    """The folder of a text encoder's tokenizer: `tokenizer_2` for `text_encoder_2`."""
    return text_encoder.replace("text_encoder", "tokenizer")


_SD = Family(denoiser="unet", text_encoders={"text_encoder": "CLIPTextModel"})
_SDXL = Family(
    denoiser="unet",
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
)
_SD3 = Family(
    denoiser="transformer",
    text_encoders={
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    optional=frozenset({"text_encoder_3"}),
)
PIPELINES: Mapping[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
}
DENOISERS: Mapping[str, str] = {"unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel"}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
CONTROLNETS = ("ControlNetModel",)
TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "CLIPTextModel": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "CLIPTextModelWithProjection": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "T5EncoderModel": ("T5TokenizerFast", "T5Tokenizer"),
}
# Not part of what turns a prompt into a picture; left out of a bundle.
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
_SCHEDULER_CLASS = re.compile(r"[A-Za-z0-9]+Scheduler")
_INDEX = "model_index.json"
_MANIFEST = "tandem.json"
# The autoencoder's folders in an export by optimum, and what its classes' names begin with.
_HALVES = ("vae_decoder", "vae_encoder")
_MARK = "ORT"
_ADOPTED = ("unet", "vae", "text_encoder", "text_encoder_2")
_SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Part:
    """One model folder: the class it is of, its `config.json`, and where its weights are.

    fused: the LoRAs that are fused into them, and their scales; empty without any.
    preset: what the configuration was read from where the weights come without one; `folder` is their file then.
    """

    folder: Path
    class_name: str
    config: Config
    weights: Weights
    fused: str = ""
    preset: Path | None = None

    @property
    def config_path(self) -> Path:
        """Where the configuration was read from."""
        return self.preset or self.folder / "config.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """What is the part's own of what it was read from: a preset's file holds prose too."""
        return self.weights.files if self.preset else (self.config_path, *self.weights.files)

    @property
    def facts(self) -> str:
        """What the part depends on besides `files`: the configuration where that has no file, and LoRAs."""
        return (json.dumps(self.config, sort_keys=True) if self.preset else "") + self.fused


@dataclass(frozen=True)
class TextSource:
    """A text encoder and the folder of its tokenizer."""

    encoder: Part
    tokenizer: Path


@dataclass(frozen=True)
class DenoiserSource:
    """A denoiser, with the scheduler and the VAE configuration that stand beside it, if any."""

    part: Part
    scheduler: SchedulerDefaults | None
    vae_config: Config | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a supported pipeline.

    texts: its text encoders by component, in the order they are joined.
    zero_negative: an absent negative prompt means zeros, as SDXL's `force_zeros_for_empty_prompt` says.
    vae_encoder: the autoencoder's other half where `vae` is a decoder alone, as optimum exports them.
    preset: which preset a single file was taken for, whose scheduler it therefore has; None where a folder says it.
    """

    folder: Path
    pipeline: str
    denoiser: Part
    vae: Part
    texts: Mapping[str, TextSource]
    scheduler: SchedulerDefaults
    zero_negative: bool = False
    vae_encoder: Part | None = None
    preset: str | None = None

    @property
    def family(self) -> Family:
        """The kind of pipeline it is a checkpoint of."""
        return PIPELINES[self.pipeline]


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read a diffusers directory's index, configurations and weight headers; no code of the checkpoint is run.

    In the place of weights there may be ONNX graphs, and in the place of `vae/` its two halves, as optimum leaves them.
    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: no diffusers directory; a pipeline, component or class that is not supported; a part missing.
    """
    if not (folder / _INDEX).is_file() or (folder / _MANIFEST).is_file():
        raise _no_checkpoint(folder)
    index = read_codeless_json(folder / _INDEX)
    where, pipeline = str(folder / _INDEX), index.get("_class_name")
    if isinstance(pipeline, str):
        pipeline = pipeline.removeprefix(_MARK)
    _require_class(where, "_class_name", pipeline, tuple(PIPELINES))
    family = PIPELINES[str(pipeline)]
    stated = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    for name, entry in stated.items():
        if name not in _IGNORED:
            _require_entry(where, name, entry, family)
    left_out = {name for name in family.optional if name not in stated}
    wanted = [name for name in (*family.classes, "scheduler") if name not in left_out | {*map(tokenizer_of, left_out)}]
    halves = {} if (folder / "vae").is_dir() else {"vae": _HALVES}
    missing = [name for name in wanted if name not in stated or not _are_there(folder, halves.get(name, (name,)))]
    if missing:
        raise CheckpointError(
            str(folder),
            f"missing component {missing[0]}",
            expected=f"folders {', '.join(wanted)}, named in {_INDEX}",
            remedy="Download the checkpoint again.",
        )
    vae_classes = (stated["vae"][1],) if halves else AUTOENCODERS
    vae = [_read_part(folder / name, "vae", vae_classes, allow_pickle) for name in halves.get("vae", ("vae",))]
    return Checkpoint(
        folder=folder,
        pipeline=str(pipeline),
        denoiser=_read_part(folder / family.denoiser, family.denoiser, family.classes[family.denoiser], allow_pickle),
        vae=vae[0],
        texts={
            name: TextSource(_read_part(folder / name, name, (kind,), allow_pickle), folder / tokenizer_of(name))
            for name, kind in family.text_encoders.items()
            if name not in left_out
        },
        scheduler=read_scheduler(folder / _SCHEDULER_CONFIG),
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", family is _SDXL)),
        vae_encoder=vae[1] if halves else None,
    )


def read_denoiser(source: Path, main: Checkpoint, *, allow_pickle: bool = False) -> DenoiserSource:
    """Read a denoiser from a pipeline directory, a folder holding `unet/` or `transformer/`, or the model's own folder.

    A single file of weights, as Hyper-SDXL's UNet is published, has the architecture of the `main` checkpoint's.
    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: none of these, a class that is not supported, or pickled weights without `allow_pickle`.
    """
    name, classes = main.family.denoiser, (DENOISERS[main.family.denoiser],)
    if source.is_file():
        like = main.denoiser
        weights = read_weights(source, allow_pickle=allow_pickle)
        part = Part(source, like.class_name, like.config, weights, preset=like.config_path)
        return DenoiserSource(part, None, None)
    pipeline = (source / name / "config.json").is_file()
    part = _read_part(source / name if pipeline else source, name, classes, allow_pickle)
    scheduler, vae = source / _SCHEDULER_CONFIG, source / "vae" / "config.json"
    return DenoiserSource(
        part,
        read_scheduler(scheduler) if pipeline and scheduler.is_file() else None,
        read_json(vae) if pipeline and vae.is_file() else None,
    )


def read_autoencoder(folder: Path, *, allow_pickle: bool = False) -> Part:
    """Read an autoencoder from its own folder, or from a pipeline directory's `vae/`.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: neither of the two, or a class that is not supported.
    """
    own = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    return _read_part(own, "vae", AUTOENCODERS, allow_pickle)


def read_controlnet(folder: Path, *, allow_pickle: bool = False) -> Part:
    """Read a ControlNet from its own folder.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: it holds none, or one of a class that is not supported.
    """
    return _read_part(folder, "ControlNet", CONTROLNETS, allow_pickle)


def read_scheduler(path: Path) -> SchedulerDefaults:
    """A diffusers scheduler configuration without its private keys.

    Raises:
        CheckpointError: not a scheduler configuration, or a value that JSON has no word for.
    """
    raw = read_json(path)
    class_name = raw.get("_class_name")
    if not isinstance(class_name, str) or not _SCHEDULER_CLASS.fullmatch(class_name):
        raise CheckpointError(str(path), "_class_name", got=class_name, expected="the name of a diffusers scheduler")
    config = {key: value for key, value in raw.items() if not key.startswith("_")}
    # diffusers writes its default as -Infinity, which is not JSON; without the key the default holds all the same.
    if config.get("lambda_min_clipped") == -math.inf:
        del config["lambda_min_clipped"]
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{path}: {key}", "scheduler value", got=value, expected="a finite number")
    return SchedulerDefaults(class_name=class_name, config=config)


def _read_part(folder: Path, component: str, classes: tuple[str, ...], allow_pickle: bool) -> Part:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(str(folder), f"no {component} here", expected="config.json", remedy="Check the path.")
    config = read_codeless_json(config_path)
    if component.startswith("text_encoder"):
        architectures = config.get("architectures") or [None]
        class_name, stem, key = architectures[0] if isinstance(architectures, list) else None, "model", "architectures"
    else:
        class_name, stem, key = config.get("_class_name"), "diffusion_pytorch_model", "_class_name"
    weights = find_weights(folder, stem, allow_pickle=allow_pickle)
    if is_foreign(weights):
        if component not in _ADOPTED:
            what, expected = f"an ONNX graph of a {component}", f"one of a {', '.join(_ADOPTED)}, or safetensors"
            raise CheckpointError(str(folder), what, expected=expected, remedy="Give the checkpoint itself.")
        # optimum's pipelines save the name of a class of their own.
        class_name = classes[0] if str(class_name).startswith(_MARK) else class_name
    _require_class(str(config_path), key, class_name, classes)
    return Part(folder, str(class_name), config, weights)


def _require_entry(where: str, name: str, entry: list[Any], family: Family) -> None:
    """Refuse what is not on the list: importing whatever an index names would run a checkpoint's code."""
    classes = family.classes
    if name != "scheduler" and name not in classes:
        expected = f"only {', '.join((*classes, 'scheduler'))}"
        raise CheckpointError(where, "component that is not supported", got=name, expected=expected)
    if len(entry) != 2:
        raise CheckpointError(f"{where}: {name}", "entry", got=entry, expected="a library and a class")
    library, class_name = entry
    expected = "diffusers" if name in ("vae", "scheduler", *DENOISERS) else "transformers"
    if library != expected:
        raise CheckpointError(f"{where}: {name}", "library", got=library, expected=expected, remedy=REMEDY)
    if name == "scheduler":
        if not isinstance(class_name, str) or not _SCHEDULER_CLASS.fullmatch(class_name):
            raise CheckpointError(f"{where}: {name}", "class", got=class_name, expected="a diffusers scheduler")
    else:
        _require_class(where, name, class_name, classes[name])


def _are_there(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).is_dir() for name in names)


def _require_class(where: str, key: str, class_name: object, allowed: tuple[str, ...]) -> None:
    if class_name not in allowed:
        raise CheckpointError(f"{where}: {key}", "class", got=class_name, expected=" or ".join(allowed), remedy=REMEDY)


def _no_checkpoint(folder: Path) -> CheckpointError:
    """Why a path without an index is no checkpoint, with what to do about it."""
    what, remedy = "not a checkpoint", "Check the path."
    if not folder.exists():
        what = "no such checkpoint"
    elif (folder / _MANIFEST).is_file():
        what, remedy = "a bundle already", "Give the checkpoint that it was exported from."
    return CheckpointError(str(folder), what, expected=f"a diffusers directory with {_INDEX}", remedy=remedy)
