"""What peft's configuration says of the updates of a LoRA: by how much each is to be multiplied."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError
from .lora_names import split_prefix

METADATA_KEY = "lora_adapter_metadata"
_NAME = re.compile(r"\^?[\w.]+")
_LARGEST = 1e9
# Whether `up @ down` added to the base's weight is all there is; the other ways to initialise change the base as well.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA", None),
    "use_dora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
MERGE = "Merge it into its base where it was trained, and export the result."


@dataclass(frozen=True)
class Config:
    """A `LoraConfig` of peft (peft/tuners/lora/config.py) as JSON, named `where` in errors."""

    where: str
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        for key, allowed in _PLAIN.items():
            value = self.values.get(key)
            if value not in allowed:
                raise CheckpointError(
                    f"{self.where}: {key}",
                    "not a plain LoRA",
                    got=value,
                    expected=" or ".join(map(repr, allowed)),
                    remedy=MERGE,
                )

    def scaling(self, module: str, rank: int) -> tuple[float, float]:
        """The alpha of a module's update, and what it is divided by.

        Raises:
            CheckpointError: the configuration states another rank, or no number.
        """
        stated = self._of_module("rank_pattern", "r", module)
        if stated != rank:
            raise CheckpointError(
                f"{self.where}: {module}",
                "rank that differs from the tensors'",
                got=stated,
                expected=str(rank),
                remedy="Use the configuration that was saved with them.",
            )
        divisor = math.sqrt(rank) if self.values.get("use_rslora") else float(rank)
        return self._of_module("alpha_pattern", "lora_alpha", module), divisor

    def _of_module(self, patterns_key: str, default_key: str, module: str) -> float:
        """A module's own number, else everybody's. peft matches the end of a name, at a dot, against patterns."""
        patterns = self.values.get(patterns_key) or {}
        if not isinstance(patterns, dict) or not all(map(_NAME.fullmatch, patterns)):
            # A regular expression of a stranger may take for ever.
            raise CheckpointError(
                f"{self.where}: {patterns_key}", "patterns", got=patterns, expected="names of modules"
            )
        fits = (value for name, value in patterns.items() if f".{module}".endswith(f".{name}") or name == f"^{module}")
        value = next(fits, self.values.get(default_key))
        if not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise CheckpointError(
                f"{self.where}: {default_key}", "number", got=value, expected=f"a number of at most {_LARGEST:g}"
            )
        return float(value)


def configs_from_metadata(where: str, metadata: Mapping[str, Any]) -> dict[str, Config]:
    """The configurations that diffusers (0.34 and later) writes into a LoRA's header, by the prefix of their modules.

    Raises:
        CheckpointError: not JSON, or not of a plain LoRA.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        values = json.loads(metadata[METADATA_KEY])
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: {METADATA_KEY}", f"not JSON ({error})", remedy="Save the LoRA again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: {METADATA_KEY}", "content", got=type(values).__name__, expected="an object")
    by_prefix: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        prefix, name = split_prefix(key)
        by_prefix.setdefault(prefix, {})[name] = value
    return {prefix: Config(f"{where}: {METADATA_KEY}", own) for prefix, own in by_prefix.items()}
