"""Code that a checkpoint brings along: never imported, and refused where the checkpoint asks for it.

Published folders hold scripts that nothing of theirs names, such as the training's; those are passed over. An index
that names a library of its own is refused where its classes are checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.safetensors_files import read_json

REMEDY = "Only models whose classes diffusers and transformers have themselves can be exported."


def read_codeless_json(path: Path) -> dict[str, Any]:
    """A configuration that asks for no code of the checkpoint's own; see `read_json`.

    Raises:
        CheckpointError: an `auto_map`, or a `_class_name` that names a module too.
    """
    config = read_json(path)
    class_name = config.get("_class_name")
    asking = {
        "auto_map": config.get("auto_map"),
        "_class_name": class_name if isinstance(class_name, (list, dict)) else None,
    }
    for key, value in asking.items():
        if value is not None:
            what = "asks for code of the checkpoint's own, which is never run"
            raise CheckpointError(f"{path}: {key}", what, got=value, remedy=REMEDY)
    return config
