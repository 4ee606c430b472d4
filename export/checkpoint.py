"""Checkpoints on disk: which folders make up a diffusers directory, and what their configurations say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.manifest import SchedulerDefaults
from .foreign_code import read_codeless_json
from .weight_files import find_weights
from .weights import Weights, read_json

Config = Mapping[str, Any]

PIPELINES = ("StableDiffusionPipeline",)
CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Not part of what turns a prompt into a picture; left out of a bundle.
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
_LIBRARIES = {"unet": "diffusers", "vae": "diffusers", "scheduler": "diffusers"}
_SCHEDULER_CLASS = re.compile(r"[A-Za-z0-9]+Scheduler")
_INDEX = "model_index.json"
_SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Part:
    """One model folder: the class it is of, its `config.json`, and where its weights are."""

    folder: Path
    class_name: str
    config: Config
    weights: Weights

    @property
    def files(self) -> tuple[Path, ...]:
        """What the part was read from."""
        return self.folder / "config.json", *self.weights.files


@dataclass(frozen=True)
class DenoiserSource:
    """A denoiser, with the scheduler and the VAE configuration that stand beside it, if any."""

    unet: Part
    scheduler: SchedulerDefaults | None
    vae_config: Config | None


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers directory of a supported pipeline."""

    folder: Path
    unet: Part
    vae: Part
    text_encoder: Part
    tokenizer: Path
    scheduler: SchedulerDefaults

    @property
    def scheduler_config(self) -> Path:
        """diffusers' file, to be copied as it is."""
        return self.folder / _SCHEDULER_CONFIG


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read a diffusers directory's index, configurations and weight headers; no code of the checkpoint is run.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: no diffusers directory; a pipeline, component or class that is not supported; a part missing.
    """
    if not (folder / _INDEX).is_file():
        raise _no_checkpoint(folder)
    index = read_codeless_json(folder / _INDEX)
    where = str(folder / _INDEX)
    _require_class(where, "_class_name", index.get("_class_name"), PIPELINES)
    stated = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    for name, entry in stated.items():
        if name not in _IGNORED:
            _require_entry(where, name, entry)
    missing = [name for name in (*CLASSES, "scheduler") if name not in stated or not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            str(folder),
            f"missing component {missing[0]}",
            expected=f"folders {', '.join((*CLASSES, 'scheduler'))}, named in {_INDEX}",
            remedy="Download the checkpoint again.",
        )
    return Checkpoint(
        folder=folder,
        unet=_read_part(folder / "unet", "unet", allow_pickle),
        vae=_read_part(folder / "vae", "vae", allow_pickle),
        text_encoder=_read_part(folder / "text_encoder", "text_encoder", allow_pickle),
        tokenizer=folder / "tokenizer",
        scheduler=read_scheduler(folder / _SCHEDULER_CONFIG),
    )


def read_denoiser(folder: Path, *, allow_pickle: bool = False) -> DenoiserSource:
    """Read a UNet from a pipeline directory, a folder holding `unet/`, or the UNet's own folder.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: none of the three, or a class that is not supported.
    """
    pipeline = (folder / "unet" / "config.json").is_file()
    unet = _read_part(folder / "unet" if pipeline else folder, "unet", allow_pickle)
    scheduler, vae = folder / _SCHEDULER_CONFIG, folder / "vae" / "config.json"
    return DenoiserSource(
        unet,
        read_scheduler(scheduler) if pipeline and scheduler.is_file() else None,
        read_json(vae) if pipeline and vae.is_file() else None,
    )


def read_decoder(folder: Path, *, allow_pickle: bool = False) -> Part:
    """Read an autoencoder from its own folder, or from a pipeline directory's `vae/`.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: neither of the two, or a class that is not supported.
    """
    own = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    return _read_part(own, "vae", allow_pickle)


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


def _read_part(folder: Path, component: str, allow_pickle: bool) -> Part:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(str(folder), f"no {component} here", expected="config.json", remedy="Check the path.")
    config = read_codeless_json(config_path)
    if component == "text_encoder":
        architectures = config.get("architectures") or [None]
        class_name, stem, key = architectures[0] if isinstance(architectures, list) else None, "model", "architectures"
    else:
        class_name, stem, key = config.get("_class_name"), "diffusion_pytorch_model", "_class_name"
    _require_class(str(config_path), key, class_name, CLASSES[component])
    return Part(folder, str(class_name), config, find_weights(folder, stem, allow_pickle=allow_pickle))


def _require_entry(where: str, name: str, entry: list[Any]) -> None:
    """Refuse what is not on the list: importing whatever an index names would run a checkpoint's code."""
    if name != "scheduler" and name not in CLASSES:
        raise CheckpointError(
            where, "component that is not supported", got=name, expected=f"only {', '.join((*CLASSES, 'scheduler'))}"
        )
    if len(entry) != 2:
        raise CheckpointError(f"{where}: {name}", "entry", got=entry, expected="a library and a class")
    expected, (library, class_name) = _LIBRARIES.get(name, "transformers"), entry
    if library != expected:
        raise CheckpointError(f"{where}: {name}", "library", got=library, expected=expected)
    if name == "scheduler":
        if not isinstance(class_name, str) or not _SCHEDULER_CLASS.fullmatch(class_name):
            raise CheckpointError(f"{where}: {name}", "class", got=class_name, expected="a diffusers scheduler")
    else:
        _require_class(where, name, class_name, CLASSES[name])


def _require_class(where: str, key: str, class_name: object, allowed: tuple[str, ...]) -> None:
    if class_name not in allowed:
        raise CheckpointError(f"{where}: {key}", "class", got=class_name, expected=" or ".join(allowed))


def _no_checkpoint(folder: Path) -> CheckpointError:
    """Why a path without an index is no checkpoint, with what to do about it."""
    what, remedy = "not a checkpoint", "Check the path."
    if not folder.exists():
        what = "no such checkpoint"
    elif folder.is_file():
        what = "a single file is not supported"
        remedy = "Load it with StableDiffusionPipeline.from_single_file, then save_pretrained."
    elif (folder / "tandem.json").is_file():
        what, remedy = "a bundle already", "Give the checkpoint that it was exported from."
    return CheckpointError(str(folder), what, expected=f"a diffusers directory with {_INDEX}", remedy=remedy)
