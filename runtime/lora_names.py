"""How the files of LoRAs spell the names of the modules they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

from .original_names import original_unet_names

PartName = Literal["unet", "transformer", "text_encoder", "text_encoder_2"]
PARTS: tuple[PartName, ...] = get_args(PartName)
"""The models that LoRAs are made for."""

# Before a module's own name, dots and all: diffusers, peft (of one model alone), and both without any prefix.
_PREFIXES: Mapping[PartName, tuple[str, ...]] = {
    "unet": ("unet.", "base_model.model.", ""),
    "transformer": ("transformer.", "base_model.model.", ""),
    "text_encoder": ("text_encoder.",),
    "text_encoder_2": ("text_encoder_2.",),
}
# Before a module's name with underscores for dots, as kohya-ss/sd-scripts writes it (networks/lora.py).
_FLAT_PREFIXES: Mapping[PartName, tuple[str, ...]] = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
# diffusers up to 0.21 kept the updates of an attention beside its layers, under names of their own.
_IN_OLD_ATTENTION = {
    "to_q": "processor.to_q",
    "to_k": "processor.to_k",
    "to_v": "processor.to_v",
    "to_out.0": "processor.to_out",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out",
}


def spellings(modules: Iterable[str], part: PartName) -> dict[str, str]:
    """Every name that a LoRA's file may give a module of `part`, and the module it means, of those there are."""
    there = tuple(modules)
    originals = original_unet_names(there) if part == "unet" else {}
    found: dict[str, str] = {}
    for module in there:
        plain = tuple(_published_names(module, part))
        dotted = (*plain, *(old for name in plain for old in _old_names(name)))
        found |= {prefix + name: module for prefix in _PREFIXES[part] for name in dotted}
        flat = (*plain, *([originals[module]] if module in originals else ()))
        found |= {prefix + name.replace(".", "_"): module for prefix in _FLAT_PREFIXES[part] for name in flat}
    return found


def split_prefix(module: str) -> tuple[str, str]:
    """The part's prefix of a dotted name in a LoRA's file, empty where there is none, and the rest."""
    for prefixes in _PREFIXES.values():
        for prefix in prefixes:
            if prefix and module.startswith(prefix):
                return prefix, module.removeprefix(prefix)
    return "", module


def text_part(module: str) -> PartName | None:
    """The text encoder that a name in a LoRA's file is about; None for a denoiser's."""
    return next((part for part in PARTS if part.startswith("text_encoder") and module.startswith(_of_part(part))), None)


def _of_part(part: PartName) -> tuple[str, ...]:
    return (*_PREFIXES[part], *_FLAT_PREFIXES[part])


def _published_names(module: str, part: PartName) -> Iterator[str]:
    """Text encoders are published with the prefix that newer versions of transformers leave out, and without it."""
    yield module
    if part.startswith("text_encoder"):
        prefix = "text_model."
        yield module.removeprefix(prefix) if module.startswith(prefix) else prefix + module


def _old_names(module: str) -> Iterator[str]:
    for name, old in _IN_OLD_ATTENTION.items():
        if module.endswith(f".{name}"):
            yield module.removesuffix(name) + old
