"""LoRAs: files of low-rank updates (arXiv 2106.09685), fused into the weights that they were trained beside.

Read are kohya's layout, with diffusers' or the original names of blocks, diffusers' own, old and new, and peft's
folders; updates of linear layers and convolutions. Not read: DoRA, LoHa, LoKr, convolutions in three factors
(`lora_mid`), changes of whole tensors such as norms and biases, and kohya's layout for SD3, by the original names of
its blocks (`lora_unet_joint_blocks_…`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import CheckpointError
from .lora_config import MERGE, METADATA_KEY, Config, configs_from_metadata
from .lora_names import PartName, spellings, split_prefix
from .weight_files import find_weights, read_weights
from .weights import SafetensorsFile, Weights, listed, read_json

if TYPE_CHECKING:
    import torch

_HALF = re.compile(
    r"(?P<module>.+?)(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<half>down|up|A|B)(?P<end>\.weight)"
)
_OTHER_HALF = {"down": "up", "up": "down", "A": "B", "B": "A"}
_FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a convolution in three factors",
}
_WHOLE = (".diff", ".diff_b", ".lora_B.bias", ".lora_up.bias")
_CONFIG = "adapter_config.json"
_AGAIN = "Download the LoRA again."
_OTHER_BASE = "Give it to the base model that it was trained on."

Configs = Config | Mapping[str, Config]
"""A folder's one configuration, or those in a file's header by the prefix of the modules they are about."""


@dataclass(frozen=True)
class Update:
    """The update of one module's weight, `alpha / divisor * up @ down`, by the names of its tensors.

    module: as the file spells it. shape: (out, in), or (out, in, height, width) for a convolution.
    alpha: a number, or the name of the tensor that holds it. divisor: the rank, or its square root.
    """

    module: str
    down: str
    up: str
    shape: tuple[int, ...]
    alpha: float | str
    divisor: float


@dataclass(frozen=True)
class Lora:
    """A LoRA: its updates, whose tensors are in `weights`; `files` is what it was read from."""

    weights: Weights
    files: tuple[Path, ...]
    updates: tuple[Update, ...]

    def load(self, update: Update) -> torch.Tensor:
        """What `update` adds to its weight at scale 1, as (out, in · height · width) float32.

        Raises:
            CheckpointError: the file is damaged, or the update is NaN or infinite.
        """
        down, up = (self.weights.load(name).float().flatten(1) for name in (update.down, update.up))
        alpha = update.alpha if isinstance(update.alpha, float) else self.weights.load(update.alpha).item()
        product = (up @ down) * (alpha / update.divisor)
        if not bool(product.isfinite().all()):
            raise CheckpointError(
                f"{self.files[0]}: {update.down}", "an update with NaN or infinite values", remedy="Use another LoRA."
            )
        return product


@dataclass(frozen=True)
class FusedWeights:
    """Weights with LoRAs fused in, each when its tensor is read; see `Weights`.

    loras: those that change a tensor, and their scales. updates: theirs, for each tensor that changes.
    """

    base: Weights
    loras: tuple[tuple[Lora, float], ...]
    updates: Mapping[str, tuple[tuple[Lora, Update, float], ...]]

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, *(path for lora, _ in self.loras for path in lora.files))

    @property
    def facts(self) -> str:
        """What the weights depend on besides the files: which LoRA counts how many times."""
        return "".join(f"{lora.files[0].name} {scale!r}\n" for lora, scale in self.loras)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    def load(self, name: str) -> torch.Tensor:
        """One tensor: float32 where a LoRA changes it, else in the dtype it is stored in; see `Weights.load`."""
        tensor = self.base.load(name)
        for lora, update, scale in self.updates.get(name, ()):
            tensor = tensor.float() + (scale * lora.load(update)).reshape(tensor.shape)
        return tensor


def read_lora(path: Path, *, allow_pickle: bool = False) -> Lora:
    """Read the header of a LoRA: a safetensors file, or a folder that peft wrote.

    allow_pickle: see `find_weights`.

    Raises:
        CheckpointError: no LoRA, one of a kind that cannot be fused, pickled, or damaged.
    """
    weights, files, configs = _open(path, allow_pickle)
    matches = {key: match for key in weights.shapes if (match := _HALF.fullmatch(key))}
    modules = {match["module"] for match in matches.values()}
    others = [key for key in weights.shapes if key not in matches and _alpha_of(key) not in modules]
    # What has a name comes first: of LoHa's tensors, it is not its alpha that tells what it is.
    for key in sorted(others, key=lambda key: _kind(key) is None):
        _require_without_effect(weights, key)
    updates = []
    for key, match in matches.items():
        other = f"{key[: match.start('half')]}{_OTHER_HALF[match['half']]}{match['end']}"
        if other not in weights.shapes:
            raise CheckpointError(
                f"{files[0]}: {key}", "half of an update", expected=f"{other} beside it", remedy=_AGAIN
            )
        if match["half"] in ("down", "A"):
            updates.append(_update(weights, configs, match["module"], key, other))
    if not updates:
        raise CheckpointError(str(path), "no LoRA in it", expected="tensors such as ….lora_down.weight", remedy=_AGAIN)
    return Lora(weights, files, tuple(updates))


def fuse(weights: Weights, loras: Sequence[tuple[Lora, float]], part: PartName) -> FusedWeights:
    """The weights of `part` with each LoRA's updates added, times its scale; those of other parts are left out.

    Raises:
        CheckpointError: an update is of another shape than its weight, or a LoRA updates a weight twice.
    """
    names = spellings(weights.shapes, part)
    found: dict[str, tuple[tuple[Lora, Update, float], ...]] = {}
    used = []
    for lora, scale in loras:
        matched = _matched(lora, weights, names)
        for name, update in matched.items():
            found[name] = (*found.get(name, ()), (lora, update, scale))
        used += [(lora, scale)] if matched else []
    return FusedWeights(weights, tuple(used), found)


def require_used(lora: Lora, parts: Mapping[PartName, Weights]) -> None:
    """Check that every update of a LoRA is of a weight in one of `parts`.

    Raises:
        CheckpointError: it is a LoRA for another base model; the first update without a weight is named.
    """
    known = {name for part, weights in parts.items() for name in spellings(weights.shapes, part)}
    left = [update for update in lora.updates if update.module not in known]
    if left:
        raise CheckpointError(
            f"{lora.files[0]}: {left[0].down}",
            f"a LoRA for another base model: {len(left)} of {len(lora.updates)} updates have no weight to change",
            got=f"an update of shape {left[0].shape}",
            expected=f"modules of {listed(parts)}",
            remedy=_OTHER_BASE,
        )


def _open(path: Path, allow_pickle: bool) -> tuple[Weights, tuple[Path, ...], Configs]:
    """A LoRA's tensors, all of its files, and what configures them."""
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise CheckpointError(
                str(path), "not a folder of peft's", expected=_CONFIG, remedy="Give the LoRA's .safetensors file."
            )
        config = Config(str(path / _CONFIG), read_json(path / _CONFIG))
        weights = find_weights(path, "adapter_model", allow_pickle=allow_pickle)
        return weights, (*weights.files, path / _CONFIG), config
    file = read_weights(path, allow_pickle=allow_pickle)
    metadata = file.metadata if isinstance(file, SafetensorsFile) else {}
    return file, file.files, configs_from_metadata(str(path), metadata)


def _update(weights: Weights, configs: Configs, module: str, down: str, up: str) -> Update:
    where, shapes = weights.files[0], (weights.shapes[down], weights.shapes[up])
    fitting = all(len(shape) in (2, 4) for shape in shapes) and set(shapes[1][2:]) <= {1}
    if not fitting or shapes[0][0] != shapes[1][1] or not shapes[0][0]:
        raise CheckpointError(
            f"{where}: {down}",
            "ranks of the two halves of an update",
            got=f"shapes {shapes[0]} and {shapes[1]}",
            expected="(rank, in, ...) and (out, rank, ...)",
            remedy=_AGAIN,
        )
    rank, alpha_name = shapes[0][0], f"{module}.alpha"
    alpha: float | str
    if alpha_name in weights.shapes:
        if math.prod(weights.shapes[alpha_name]) != 1:
            raise CheckpointError(
                f"{where}: {alpha_name}", "shape", got=weights.shapes[alpha_name], expected="one number", remedy=_AGAIN
            )
        alpha, divisor = alpha_name, float(rank)
    else:
        alpha, divisor = _scaling(configs, f"{where}: {down}", module, rank)
    return Update(module, down, up, (shapes[1][0], *shapes[0][1:]), alpha, divisor)


def _scaling(configs: Configs, where: str, module: str, rank: int) -> tuple[float, float]:
    """The alpha of an update that has no tensor for it, and its divisor: as configured, else the rank both."""
    prefix, own_name = split_prefix(module)
    if isinstance(configs, Config):
        return configs.scaling(own_name, rank)
    if prefix in configs:
        return configs[prefix].scaling(own_name, rank)
    if configs:
        raise CheckpointError(
            where,
            f"a module that the header's {METADATA_KEY} says nothing of",
            got=f"prefix {prefix!r}",
            expected=" or ".join(map(repr, configs)),
            remedy=_AGAIN,
        )
    return float(rank), float(rank)


def _require_without_effect(weights: Weights, key: str) -> None:
    """Refuse a tensor that is no low-rank update, unless it is a change by nothing."""
    if key.endswith(_WHOLE) and not bool(weights.load(key).any()):
        return
    kind = _kind(key)
    what = f"{kind} is not supported" if kind else "a tensor that is no low-rank update"
    raise CheckpointError(
        f"{weights.files[0]}: {key}", what, got=f"shape {weights.shapes[key]}", expected="a plain LoRA", remedy=MERGE
    )


def _kind(key: str) -> str | None:
    return next((kind for mark, kind in _FOREIGN.items() if mark in key), None)


def _alpha_of(key: str) -> str | None:
    return key.removesuffix(".alpha") if key.endswith(".alpha") else None


def _matched(lora: Lora, weights: Weights, names: Mapping[str, str]) -> dict[str, Update]:
    """The updates of a LoRA that change one of `weights`, by its name; a linear layer is a convolution of 1x1."""
    found: dict[str, Update] = {}
    for update in lora.updates:
        name = names.get(update.module)
        if name is None:
            continue
        where = f"{lora.files[0]}: {update.down}"
        if name in found:
            other = f"{found[name].down} too"
            raise CheckpointError(where, f"a second update of {name}", got=other, expected="one", remedy=_AGAIN)
        if _without_ones(update.shape) != _without_ones(weights.shapes[name]):
            raise CheckpointError(
                where,
                f"a LoRA for another base model: the update of {name} is of another shape",
                got=update.shape,
                expected=str(weights.shapes[name]),
                remedy=_OTHER_BASE,
            )
        found[name] = update
    return found


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if set(shape[2:]) == {1} else shape
