"""Code that a checkpoint brings along: refused by name, never imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError
from .weights import read_json

_REMEDY = "Only models whose classes diffusers and transformers have themselves can be exported."


def read_codeless_json(path: Path) -> dict[str, Any]:
    """A configuration in a folder without Python files that asks for none; see `read_json`.

    Raises:
        CheckpointError: a Python file beside it, an `auto_map`, or a `_class_name` that names a module too.
    """
    scripts = sorted(path.parent.glob("*.py"))
    if scripts:
        raise CheckpointError(str(scripts[0]), "code in a checkpoint, which is never run", remedy=_REMEDY)
    config = read_json(path)
    class_name = config.get("_class_name")
    asking = {
        "auto_map": config.get("auto_map"),
        "_class_name": class_name if isinstance(class_name, (list, dict)) else None,
    }
    for key, value in asking.items():
        if value is not None:
            what = "asks for code of the checkpoint's own, which is never run"
            raise CheckpointError(f"{path}: {key}", what, got=value, remedy=_REMEDY)
    return config
