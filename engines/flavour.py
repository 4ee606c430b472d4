"""TensorRT and TensorRT for RTX, which share their interface: the one that a target names, imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any

from ..runtime.errors import TargetError
from ..runtime.targets import PORTABLE, install_hint, nvidia_gpus

_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
BACKENDS = frozenset(_MODULES)


def imported(backend: str) -> Any:
    """The module of a flavour.

    Raises:
        TargetError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(_MODULES[backend])
    except Exception as error:  # a damaged installation fails in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TargetError(
            backend, f"cannot be imported ({reason})", remedy=f"Run `{install_hint(backend)}`."
        ) from error


def require_buildable(backend: str, device: str) -> None:
    """Check that engines of a flavour can be built here for a device, without building one.

    Raises:
        TargetError: the flavour is missing, does not know an architecture, or needs a GPU that is not here.
    """
    trt = imported(backend)
    if backend == "tensorrt":
        # It times kernels on the very GPU the engine is for.
        if not nvidia_gpus():
            raise TargetError(
                f"target {backend}:{device}",
                "TensorRT builds on the GPU that the engine is for, and no NVIDIA driver is running here",
                remedy="Build on a machine with that GPU, or build for tensorrt-rtx, which needs none.",
            )
        return
    capabilities(trt, backend, device)


def capabilities(trt: Any, backend: str, device: str) -> tuple[Any, ...]:
    """The flavour's names of the architectures in `device`, `sm89+sm120`; none for `portable`.

    Raises:
        TargetError: it does not know one of them.
    """
    if device == PORTABLE:
        return ()
    known = {name.lower(): value for name, value in vars(trt.ComputeCapability).items() if name.startswith("SM")}
    unknown = [sm for sm in device.split("+") if sm not in known]
    if unknown:
        expected = f"of {', '.join(sorted(known, key=lambda sm: int(sm[2:])))}, or {PORTABLE}"
        raise TargetError(f"target {backend}", "GPU architecture", got=unknown[0], expected=expected)
    return tuple(known[sm] for sm in device.split("+"))
