"""TensorRT and TensorRT for RTX, which share their interface: the one that a target names, imported when it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.backends.modules import imported
from ..runtime.engine_files import REFIT, VERSION_COMPATIBLE
from ..runtime.errors import ArgumentError, TargetError
from ..runtime.manifest import Component
from ..runtime.targets import ENGINES_ONLY, PORTABLE, Target, has_nvidia_driver

# The first architecture that TensorRT-RTX 1.7 builds for in a precision; in fp32 it lacks matrix products alone before.
_FIRST = {"fp32": "sm80", "bf16": "sm80", "fp8": "sm89"}


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
        ArgumentError: the flavour does not know an architecture.
        TargetError: it is missing, or needs a GPU that is not here.
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


def require_precision(name: str, target: Target, model: Path) -> None:
    """Check that TensorRT-RTX builds component `name` in a target's precision for all of its architectures.

    Its builder tells so too, at the end of the build and in words of its own.

    Raises:
        TargetError: it does not, for one of them.
    """
    first = _FIRST.get(target.precision or "")
    if target.backend != "tensorrt-rtx" or target.device == PORTABLE or first is None:
        return
    before = " and ".join(sm for sm in target.device.split("+") if int(sm[2:]) < int(first[2:]))
    if not before or (target.precision == "fp32" and not _multiplies(model)):
        return
    remedy = {
        "fp32": f"Export the bundle with `tandemrt export --dtype fp16`, or leave {before} out.",
        "bf16": f"Ask for {target.backend}:{target.device}:fp16, or leave {before} out.",
        "fp8": f"Leave {before} out.",
    }
    products = "matrix products in " if target.precision == "fp32" else ""
    what = f"TensorRT-RTX builds no {products}{target.precision} for this architecture"
    raise TargetError(name, what, got=before, expected=f"{first} or newer", remedy=remedy[target.precision or ""])


def require_tables(name: str, target: Target, component: Component) -> None:
    """Raise TargetError when TensorRT is to take rows of a table that is kept in eight bits, which it cannot."""
    quantization = component.quantization
    tables = [] if quantization is None else quantization.settings.get("tables", [])
    if target.backend in ENGINES_ONLY and tables:
        remedy = f"Quantize the bundle again with `--keep '{tables[0]}'`, or run it on another backend."
        what = f"a table in eight bits, of which {target.backend} takes no rows"
        raise TargetError(name, what, got=tables[0], remedy=remedy)


def _multiplies(model: Path) -> bool:
    import onnx  # noqa: PLC0415 (of the extra `export`)

    nodes = onnx.load(model, load_external_data=False).graph.node
    return any(node.op_type in ("MatMul", "Gemm") for node in nodes)


def capabilities(trt: Any, backend: str, device: str) -> tuple[Any, ...]:
    """The flavour's names of the architectures in `device`, `sm89+sm120`; none for `portable`.

    Raises:
        ArgumentError: it does not know one of them.
    """
    if device == PORTABLE:
        return ()
    known = {name.lower(): value for name, value in vars(trt.ComputeCapability).items() if name.startswith("SM")}
    unknown = [sm for sm in device.split("+") if sm not in known]
    if unknown:
        expected = f"one of {', '.join(sorted(known, key=lambda sm: int(sm[2:])))}, or {PORTABLE}"
        raise ArgumentError(f"target {backend}", "GPU architecture", got=unknown[0], expected=expected)
    return tuple(known[sm] for sm in device.split("+"))
