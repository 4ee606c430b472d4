"""TensorRT and TensorRT for RTX, which share their interface: the one that a target names, imported when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..runtime.backends.modules import imported
from ..runtime.engine_files import REFIT, VERSION_COMPATIBLE
from ..runtime.errors import TargetError
from ..runtime.targets import PORTABLE, has_nvidia_driver


@dataclass(frozen=True, slots=True)
class Options:
    """What else the engines of a flavour are to be able to do.

    refit: of components that LoRAs change, to hold these in their weights without being built again.
    version_compatible: to run on newer versions of the same major, which an engine does on the lean runtime that it
        then carries, as code.
    """

    refit: bool = False
    version_compatible: bool = False

    def flags(self, backend: str, device: str) -> dict[str, str | int | bool]:
        """As `Ingredients.flags`; TensorRT's portable engines are version-compatible in any case."""
        compatible = self.version_compatible or (backend, device) == ("tensorrt", PORTABLE)
        return {**({REFIT: True} if self.refit else {}), **({VERSION_COMPATIBLE: True} if compatible else {})}

    @property
    def words(self) -> str:
        """The options as they are given."""
        return " and ".join(
            option
            for given, option in ((self.refit, "--refit"), (self.version_compatible, "--version-compatible"))
            if given
        )


PLAIN_OPTIONS = Options()


def require_buildable(backend: str, device: str, options: Options = PLAIN_OPTIONS) -> None:
    """Check that engines of a flavour can be built here for a device, without building one.

    Raises:
        TargetError: the flavour is missing, does not know an architecture, or needs a GPU that is not here.
    """
    trt = imported(backend)
    if backend == "tensorrt":
        # It times kernels on the very GPU the engine is for.
        if not has_nvidia_driver():
            raise TargetError(
                f"target {backend}:{device}",
                "TensorRT builds on the GPU that the engine is for, and no NVIDIA driver is running here",
                remedy="Build on a machine with that GPU, or build for tensorrt-rtx, which needs none.",
            )
        _require_here(device)
        return
    capabilities(trt, backend, device)
    if options.words and not has_nvidia_driver():
        # So TensorRT-RTX 1.7: its builder fails at the end of the build.
        remedy = "Build on a machine with an NVIDIA GPU, or without it."
        if options.refit:
            remedy += " Engines built with --lora-slots take LoRAs with each request and need no refit."
        what = f"{options.words} asks for an engine that its builder makes only where there is a GPU"
        raise TargetError(f"target {backend}:{device}", what, remedy=remedy)


def _require_here(device: str) -> None:
    """Raise TargetError when a device is neither that of the GPU here nor `portable`."""
    if device == PORTABLE:
        return
    from ..runtime.backends import cuda  # noqa: PLC0415 (cuda-bindings, of an extra)

    here = cuda.device().architecture
    if device != here:
        remedy = "Build on a machine with that GPU."
        what = "TensorRT builds for the GPU that is here"
        raise TargetError(
            f"target tensorrt:{device}", what, got=device, expected=f"{here} or {PORTABLE}", remedy=remedy
        )


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
        expected = f"one of {', '.join(sorted(known, key=lambda sm: int(sm[2:])))}, or {PORTABLE}"
        raise TargetError(f"target {backend}", "GPU architecture", got=unknown[0], expected=expected)
    return tuple(known[sm] for sm in device.split("+"))
