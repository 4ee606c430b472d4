"""Checkpoints in one file of their authors' own layout, read as if they lay in a diffusers directory.

What such a file does not say comes from the preset of the family that its tensors' names tell, the one whose denoiser
is closest in size: configurations and scheduler. Whether every tensor fits is seen when the models are filled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.errors import ArgumentError, CheckpointError
from ..runtime.safetensors_files import listed, read_json
from . import original_layout as layouts
from .agreement import prediction_type as predicted
from .checkpoint import Checkpoint, Part, TextSource, tokenizer_of
from .pickled import PICKLES
from .presets import Model, Preset, model_file, models, read_preset
from .remapped import Origin, Remapped
from .weights import Weights, parameters, read_header

_CONVERT = "Load it with diffusers' from_single_file where you trust it, then save_pretrained."
# What training and the samplers of old leave in a file, and buffers that are made anew.
_UNUSED = re.compile(
    r"model_ema\..*|betas|logvar|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+|"
    r"denoiser\.(log_)?sigmas|first_stage_model\.loss\..*|.*\.embeddings\.position_ids|.*\.logit_scale|"
    r"(cond_stage_model|conditioner\.embedders\.0)\.text_projection"
)
_MODEL_TYPES = {
    "CLIPTextModel": "clip_text_model",
    "CLIPTextModelWithProjection": "clip_text_model",
    "T5EncoderModel": "t5",
}
_PROJECTION = "text_projection.weight"


@dataclass(frozen=True)
class _Family:
    """Files of one layout: the beginnings of names that no other has, the models by component, what they may be.

    models: what the names of a component's tensors begin with, and how the rest of them is to be read; the denoiser's
        stand first.
    """

    marks: tuple[str, ...]
    models: Mapping[str, tuple[str, layouts.Layout]]
    presets: tuple[str, ...]


_LATENT_DIFFUSION: Mapping[str, tuple[str, layouts.Layout]] = {
    "unet": ("model.diffusion_model.", layouts.unet),
    "vae": ("first_stage_model.", layouts.autoencoder),
}
_FAMILIES = (
    _Family(
        ("model.diffusion_model.joint_blocks.", "text_encoders.clip_g."),
        {
            "transformer": ("model.diffusion_model.", layouts.mmdit),
            "vae": ("first_stage_model.", layouts.autoencoder),
            "text_encoder": ("text_encoders.clip_l.transformer.", layouts.clip),
            "text_encoder_2": ("text_encoders.clip_g.transformer.", layouts.clip),
            "text_encoder_3": ("text_encoders.t5xxl.transformer.", layouts.t5),
        },
        ("sd3-medium", "sd3-medium-no-t5"),
    ),
    _Family(
        ("conditioner.embedders.",),
        {
            **_LATENT_DIFFUSION,
            "text_encoder": ("conditioner.embedders.0.transformer.", layouts.clip),
            "text_encoder_2": ("conditioner.embedders.1.model.", layouts.openclip),
        },
        ("sdxl", "ssd-1b", "koala-700m"),
    ),
    _Family(
        ("cond_stage_model.model.",),
        {**_LATENT_DIFFUSION, "text_encoder": ("cond_stage_model.model.", layouts.openclip)},
        ("sd21-base", "sd21"),
    ),
    _Family(
        ("cond_stage_model.transformer.",),
        {**_LATENT_DIFFUSION, "text_encoder": ("cond_stage_model.transformer.", layouts.clip)},
        ("sd15",),
    ),
)


def read_single_file(
    file: Path, tokenizer: Path | None, prediction_type: object, replaced: Collection[str] = ()
) -> Checkpoint:
    """Read a Stable Diffusion 1, 2, XL or 3 checkpoint from one safetensors file; only its header is read yet.

    tokenizer: a folder with a CLIP tokenizer's files, or a pipeline directory with `tokenizer/`, `tokenizer_2/` …
    prediction_type: what the denoiser predicts, where several presets differ in nothing else.
    replaced: components that others are taken in place of, `unet`, `transformer` or `vae`: where the file holds none,
        a part without weights stands for it.

    Raises:
        ArgumentError: the tokenizer or the prediction type is needed and not given.
        CheckpointError: another kind of file; models are missing; tensors that are of none of them.
    """
    if any(map(file.match, PICKLES)):
        raise CheckpointError(str(file), "a pickled checkpoint", expected="a .safetensors file", remedy=_CONVERT)
    base = read_header(file)
    family = _family(base)
    name, preset = _preset(base, family, prediction_type, replaced)
    parts = _parts(base, family, preset)
    texts = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    folders = _tokenizers(preset, tokenizer)
    return Checkpoint(
        folder=file,
        pipeline=preset.pipeline,
        denoiser=parts.get("unet") or parts["transformer"],
        vae=parts["vae"],
        texts={name: TextSource(part, folders[name]) for name, part in texts.items()},
        scheduler=preset.scheduler,
        zero_negative=preset.pipeline == "StableDiffusionXLPipeline",
        preset=name,
    )


def _family(base: Weights) -> _Family:
    for family in _FAMILIES:
        if any(name.startswith(family.marks) for name in base.shapes):
            return family
    raise CheckpointError(
        str(base.files[0]),
        f"not a checkpoint in its authors' layout (it holds {listed(base.shapes)})",
        expected=f"a denoiser, an autoencoder and text encoders ({', '.join(each.marks[0] for each in _FAMILIES)}*)",
        remedy="Give a diffusers directory; a denoiser alone goes beside one, as --denoiser.",
    )


def _preset(base: Weights, family: _Family, prediction_type: object, replaced: Collection[str]) -> tuple[str, Preset]:
    """The preset with the models that are in the file and a denoiser of about its size, behind its name."""
    present = {
        component
        for component, (prefix, _) in family.models.items()
        if component in replaced or any(name.startswith(prefix) for name in base.shapes)
    }
    presets = {name: preset for name in family.presets if (preset := read_preset(name)).models.keys() == present}
    if not presets:
        least = min(map(read_preset, family.presets), key=lambda preset: len(preset.models))
        missing = next(component for component in family.models if component in least.models.keys() - present)
        option = {"vae": "--vae", "unet": "--denoiser", "transformer": "--denoiser"}.get(missing)
        raise CheckpointError(
            str(base.files[0]),
            f"missing component {missing}",
            expected=f"tensors {family.models[missing][0]}*",
            remedy=(f"Give one with {option}, or u" if option else "U")
            + "se a file that holds every model, or a diffusers directory.",
        )
    distances = {name: _distance(base, family, preset) for name, preset in presets.items()}
    closest = {
        name: predicted(presets[name].scheduler) for name in presets if distances[name] == min(distances.values())
    }
    if len(set(closest.values())) > 1 and prediction_type not in closest.values():
        raise ArgumentError(
            "--solver-config prediction_type",
            f"cannot be told from the tensors of {base.files[0]}",
            got=prediction_type,
            expected=" or ".join(closest.values()),
            remedy="Give --solver-config prediction_type=epsilon for one of 512 px, =v_prediction for one of 768 px.",
        )
    name = next((name for name, kind in closest.items() if kind == prediction_type), next(iter(closest)))
    return name, presets[name]


def _distance(base: Weights, family: _Family, preset: Preset) -> int:
    """How many parameters more or fewer than the preset's the file's denoiser has; 0 where it has none."""
    component = next(iter(family.models))
    prefix = family.models[component][0]
    own = Remapped(base, {name: Origin(name) for name in base.shapes if name.startswith(prefix)}, {})
    return abs(parameters(own) - models()[preset.models[component]].parameters) if own.origins else 0


def _parts(base: Weights, family: _Family, preset: Preset) -> dict[str, Part]:
    """Every model, in the preset's order."""
    left = {name for name in base.shapes if not _UNUSED.fullmatch(name)}
    found: dict[str, Part] = {}
    for component, model_name in preset.models.items():
        prefix, layout = family.models[component]
        model = models()[model_name]
        origins, unknown = _origins(base, prefix, left, layout, model)
        left = {name for name in left if not name.startswith(prefix)} | unknown
        identities = {}
        if layout is layouts.clip and model.class_name == "CLIPTextModelWithProjection" and _PROJECTION not in origins:
            # As the authors' own code: what the file leaves out stays as it was made.
            identities = {_PROJECTION: model.config["projection_dim"]}
        found[component] = Part(
            folder=Path(base.files[0]),
            class_name=model.class_name,
            config={**_class_keys(model.class_name), **model.config},
            weights=Remapped(base, origins, identities),
            preset=model_file(model_name),
        )
    if left:
        raise CheckpointError(
            str(base.files[0]),
            f"tensors that are of none of its models: {listed(left)}",
            expected=f"those of {preset.pipeline}",
            remedy=_CONVERT,
        )
    return found


def _origins(
    base: Weights, prefix: str, names: Collection[str], layout: layouts.Layout, model: Model
) -> tuple[dict[str, Origin], set[str]]:
    """Where the tensors of a model lie in the file, and those of `names` with its prefix that are unknown."""
    own = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    convert = layout(own, model)
    origins: dict[str, Origin] = {}
    unknown: set[str] = set()
    for name in own:
        converted = convert(name)
        if converted is None:
            unknown.add(prefix + name)
            continue
        twice = converted.keys() & origins.keys()
        if twice:
            raise CheckpointError(f"{base.files[0]}: {prefix}{name}", f"a second tensor for {listed(twice)}")
        origins.update({new: replace(origin, name=prefix + name) for new, origin in converted.items()})
    return origins, unknown


def _class_keys(class_name: str) -> dict[str, Any]:
    """What a `config.json` says of its class."""
    if class_name in _MODEL_TYPES:
        return {"architectures": [class_name], "model_type": _MODEL_TYPES[class_name]}
    return {"_class_name": class_name}


def _tokenizers(preset: Preset, folder: Path | None) -> dict[str, Path]:
    """The tokenizer of each text encoder."""
    encoders = {name: models()[model] for name, model in preset.models.items() if name.startswith("text_encoder")}
    names = {name: tokenizer_of(name) for name in encoders}
    expected = f"a pipeline directory with {', '.join(f'{each}/' for each in names.values())}"
    if folder is None:
        raise ArgumentError(
            "--tokenizer",
            "not given, and a single file holds none",
            expected=f"{expected}" + (" or a tokenizer's own folder" if len(names) == 1 else ""),
            remedy=f"Download the tokenizer of {preset.published_as[0]}.",
        )
    own = len(names) == 1 and not (folder / "tokenizer").is_dir()
    folders = {name: folder if own else folder / names[name] for name in encoders}
    for name, path in folders.items():
        if not path.is_dir():
            raise ArgumentError("--tokenizer", "no tokenizer here", got=str(path), expected=expected)
        stated = _pad_token(path)
        if encoders[name].pad_token not in (None, stated):
            raise CheckpointError(
                f"{path}: pad_token",
                f"the tokenizer of another model than {name}",
                got=stated,
                expected=repr(encoders[name].pad_token),
                remedy=f"Give the tokenizer of {preset.published_as[0]}.",
            )
    return folders


def _pad_token(folder: Path) -> object:
    """What prompts are filled up with, from where transformers reads it."""
    settings, extra = read_json(folder / "tokenizer_config.json"), folder / "special_tokens_map.json"
    token = settings.get("pad_token")
    if "added_tokens_decoder" not in settings and extra.is_file():
        token = read_json(extra).get("pad_token", token)
    return token.get("content") if isinstance(token, dict) else token
