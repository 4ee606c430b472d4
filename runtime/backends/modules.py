"""The modules of backends, which are heavy and of extras: each is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import TargetError
from ..targets import install_hint
from .buffers import one_line


def imported(backend: str) -> Any:
    """The module of a backend, such as `tensorrt_rtx` of `tensorrt-rtx`.

    Raises:
        TargetError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(backend.replace("-", "_"))
    except Exception as error:  # a damaged installation fails in any way
        what, remedy = f"cannot be imported ({one_line(error)})", f"Run `{install_hint(backend)}`."
        raise TargetError(backend, what, remedy=remedy) from error
