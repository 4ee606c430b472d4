"""Modules of TandemRT's runtime that need numpy alone, in interpreters that have not got what the runtime needs."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

_RUNTIME = Path(__file__).parents[2] / "runtime"
_PACKAGE = "borrowed_runtime"


def runtime_module(name: str) -> Any:
    """A module of the runtime, such as `rng`, without the package around it, whose import needs more."""
    if _PACKAGE not in sys.modules:
        spec = ModuleSpec(_PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(_RUNTIME)]
        sys.modules[_PACKAGE] = module_from_spec(spec)
    return import_module(f"{_PACKAGE}.{name}")
