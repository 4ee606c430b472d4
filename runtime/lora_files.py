"""LoRAs: files of low-rank updates (arXiv 2106.09685), read without running what is in them.

Read are kohya's layout, with diffusers' or the original names of blocks, diffusers' own, old and new, and peft's
folders; updates of linear layers and convolutions. Not read: DoRA, LoHa, LoKr, convolutions in three factors
(`lora_mid`), changes of whole tensors such as norms and biases, and kohya's layout for SD3, by the original names of
its blocks (`lora_unet_joint_blocks_…`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError
from .lora_config import MERGE, METADATA_KEY, Config, configs_from_metadata
from .lora_names import PartName, spellings, split_prefix
from .lora_slots import LowRank
from .safetensors_files import AGAIN, read_header, read_json

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
OTHER_BASE = "Give it to the base model that it was trained on."
PEFT_STEM = "adapter_model"

Configs = Config | Mapping[str, Config]
"""A folder's one configuration, or those in a file's header by the prefix of the modules they are about."""


class Tensors(Protocol):
    """What a LoRA's file or folder holds by name; `files[0]` is named in errors, `metadata` is not checked."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def array(self, name: str) -> npt.NDArray[Any]:
        """One tensor; raises CheckpointError where the file is damaged."""


@dataclass(frozen=True)
class Update:
    """The update of one module's weight, `alpha / divisor * up @ down`, by the names of its tensors.

    module: as the file spells it. shape: (out, in), or (out, in, height, width) for a convolution. rank: of both.
    alpha: a number, or the name of the tensor that holds it. divisor: the rank, or its square root.
    """

    module: str
    down: str
    up: str
    shape: tuple[int, ...]
    rank: int
    alpha: float | str
    divisor: float


@dataclass(frozen=True)
class Lora:
    """A LoRA: its updates, whose tensors are in `tensors`; `files` is what it was read from."""

    tensors: Tensors
    files: tuple[Path, ...]
    updates: tuple[Update, ...]

    def factors(self, update: Update) -> LowRank:
        """What `update` adds to its weight at scale 1, as up · down, where down is (rank, in · height · width).

        Raises:
            CheckpointError: the file is damaged, or the update is NaN or infinite.
        """
        alpha = update.alpha if isinstance(update.alpha, float) else float(self.tensors.array(update.alpha).reshape(()))
        # What overflows is refused by name, without numpy's warning before it.
        with np.errstate(over="ignore", invalid="ignore"):
            down, up = (self.tensors.array(name).astype(np.float32) for name in (update.down, update.up))
            down, up = down.reshape(update.rank, -1), up.reshape(-1, update.rank)
            up *= np.float32(alpha / update.divisor)
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise CheckpointError(
                f"{self.files[0]}: {update.down}", "an update with NaN or infinite values", remedy="Use another LoRA."
            )
        return LowRank(down, up)

    def matched(self, shapes: Mapping[str, tuple[int, ...]], part: PartName) -> dict[str, Update]:
        """The updates of modules of a model, by the names it gives them; a linear layer is a convolution of 1x1.

        shapes: those of the modules' weights, (out, in) or (out, in, height, width). part: which model it is.

        Raises:
            CheckpointError: an update is of another shape than its weight, or a second one of the same.
        """
        names, found = spellings(shapes, part), dict[str, Update]()
        for update in self.updates:
            name = names.get(update.module)
            if name is None:
                continue
            where = f"{self.files[0]}: {update.down}"
            if name in found:
                other = f"{found[name].down} too"
                raise CheckpointError(
                    where, f"a second update of {name}.weight", got=other, expected="one", remedy=AGAIN
                )
            if _without_ones(update.shape) != _without_ones(shapes[name]):
                raise CheckpointError(
                    where,
                    f"a LoRA for another base model: the update of {name}.weight is of another shape",
                    got=update.shape,
                    expected=str(shapes[name]),
                    remedy=OTHER_BASE,
                )
            found[name] = update
        return found


def open_tensors(path: Path) -> Tensors:
    """The tensors of a LoRA's safetensors file, or of a folder that peft wrote; raises CheckpointError."""
    return read_header(path / f"{PEFT_STEM}.safetensors" if path.is_dir() else path)


def read_lora(path: Path, opened: Callable[[Path], Tensors] = open_tensors) -> Lora:
    """Read the header of a LoRA: a safetensors file, or a folder that peft wrote.

    opened: opens the file, or the weights in the folder.

    Raises:
        CheckpointError: no LoRA, one of a kind that cannot be fused, or damaged.
    """
    if path.is_dir() and not (path / _CONFIG).is_file():
        raise CheckpointError(
            str(path), "not a folder of peft's", expected=_CONFIG, remedy="Give the LoRA's .safetensors file."
        )
    configs: Configs
    if path.is_dir():
        configs = Config(str(path / _CONFIG), read_json(path / _CONFIG))
        weights = opened(path)
        files = (*weights.files, path / _CONFIG)
    else:
        weights = opened(path)
        configs, files = configs_from_metadata(str(path), weights.metadata), weights.files
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
                f"{files[0]}: {key}", "half of an update", expected=f"{other} beside it", remedy=AGAIN
            )
        if match["half"] in ("down", "A"):
            updates.append(_update(weights, configs, match["module"], key, other))
    if not updates:
        raise CheckpointError(str(path), "no LoRA in it", expected="tensors such as ….lora_down.weight", remedy=AGAIN)
    return Lora(weights, files, tuple(updates))


def _update(weights: Tensors, configs: Configs, module: str, down: str, up: str) -> Update:
    where, shapes = weights.files[0], (weights.shapes[down], weights.shapes[up])
    fitting = all(len(shape) in (2, 4) for shape in shapes) and set(shapes[1][2:]) <= {1}
    if not fitting or shapes[0][0] != shapes[1][1] or not shapes[0][0]:
        raise CheckpointError(
            f"{where}: {down}",
            "ranks of the two halves of an update",
            got=f"shapes {shapes[0]} and {shapes[1]}",
            expected="(rank, in, ...) and (out, rank, ...)",
            remedy=AGAIN,
        )
    rank, alpha_name = shapes[0][0], f"{module}.alpha"
    alpha: float | str
    if alpha_name in weights.shapes:
        if math.prod(weights.shapes[alpha_name]) != 1:
            raise CheckpointError(
                f"{where}: {alpha_name}", "shape", got=weights.shapes[alpha_name], expected="one number", remedy=AGAIN
            )
        alpha, divisor = alpha_name, float(rank)
    else:
        alpha, divisor = _scaling(configs, f"{where}: {down}", module, rank)
    return Update(module, down, up, (shapes[1][0], *shapes[0][1:]), rank, alpha, divisor)


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
            remedy=AGAIN,
        )
    return float(rank), float(rank)


def _require_without_effect(weights: Tensors, key: str) -> None:
    """Refuse a tensor that is no low-rank update, unless it is a change by nothing."""
    if key.endswith(_WHOLE) and not bool(weights.array(key).any()):
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


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if set(shape[2:]) == {1} else shape
