"""How tests read the model repositories that `tandemrt export-triton` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

SIZES = "64x64:b1-b4"
Export = Callable[..., Path]


def configs(out: Path) -> dict[str, ModelConfig]:
    """The configurations of a repository, by model; what Triton's schema has not is an error."""
    return {path.parent.name: parsed(path.read_text("utf-8")) for path in sorted(out.glob("*/config.pbtxt"))}


def parsed(text: str) -> ModelConfig:
    made: ModelConfig = text_format.Parse(text, ModelConfig())
    return made
