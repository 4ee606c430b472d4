"""Targets: the backend, device and precision a bundle runs on, and which of them are available here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from .errors import ArgumentError, TargetError
from .manifest import Component, Manifest

_NVIDIA = Path("/proc/driver/nvidia")
_NVIDIA_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
# In the place of an architecture: every one that a flavour of TensorRT can build for at once.
PORTABLE = "portable"
_SM = rf"{PORTABLE}|sm\d{{2,3}}(\+sm\d{{2,3}})*"
# What a bundle may be exported in for a precision; what is in int8 and fp8 its manifest tells.
_EXPORTED_IN = {"fp32": ("fp32",), "fp16": ("fp16",), "bf16": ("fp32", "fp16")}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model runs: `backend:device:precision`. `reason` says why `auto` chose it.

    gpus: for TensorRT's flavours which of the GPUs here, by CUDA's index; on a second one the second branch of guidance
        may run, everything else is on the first.

    precision: that of the arithmetic, or None to take the bundle as it is. It lives in the graph: fp32 and fp16 ask for
        a bundle exported so, bf16 for one in either (TensorRT's flavours: fp16); where layers are quantized they are
        about the rest. int8 and fp8 ask for a bundle with components that are quantized so, others are as they are.
    """

    backend: str
    device: str
    precision: str | None = None
    reason: str = field(default="", compare=False)
    gpus: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return ":".join(part for part in (self.backend, self.device, self.precision) if part)

    def check_precision(self, component: str, precision: str) -> None:
        """Raise TargetError when this target asks for another precision than `component` was exported in."""
        fitting = _EXPORTED_IN.get(self.precision or "", (precision,))
        if self.precision == "bf16" and self.backend in ENGINES_ONLY:
            fitting = ("fp16",)  # whose graph, islands and all, they are built from in the other type
        if precision not in fitting:
            wanted = " or ".join(fitting)
            raise TargetError(
                component,
                "precision of the exported model",
                got=precision,
                expected=f"{wanted} for target {self}",
                remedy=f"Ask for {self.backend}:{self.device}:{precision}, or export the bundle again with "
                f"`tandemrt export --dtype {fitting[-1]}`.",
            )

    def of_component(self, component: Component) -> Target:
        """What is asked of one component: what its graph says where nothing else is named, or quantization is."""
        named = None if self.quantizes else self.precision
        return replace(self, precision=named or component.computes_in)

    @property
    def quantizes(self) -> bool:
        """Whether the precision is one that graphs are quantized in."""
        return self.precision is not None and self.precision not in _EXPORTED_IN

    def told(self, manifest: Manifest) -> str:
        """The target, and what a bundle's layers are quantized to where it names a precision for all others alone."""
        others = self.precision is not None and not self.quantizes
        quantized = sorted({one.computes_in for one in manifest.components.values()} - set(_EXPORTED_IN))
        return ", ".join([str(self), *(f"{precision} layers" for precision in quantized if others)])

    def check_quantized(self, where: str, manifest: Manifest) -> None:
        """Raise TargetError when this target asks for a quantized bundle, and no component of one is quantized so."""
        parts = manifest.components.values()
        if self.quantizes and all(component.computes_in != self.precision for component in parts):
            precisions = sorted({component.computes_in for component in parts})
            raise TargetError(
                where,
                f"nothing in it is quantized to {self.precision}, for target {self}",
                got=", ".join(precisions),
                remedy=f"Make one that is with `tandemrt calibrate quantize {where} --format {self.precision}`, or ask "
                f"for {self.backend}:{self.device}.",
            )


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What `doctor` says of a backend.

    version: of the installed package, None where there is none.
    devices: execution providers of a backend that runs here, GPUs of one that needs NVIDIA's driver.
    targets: what this version runs here.
    missing: what keeps it from running, one plain sentence each.
    builds: whether engines can be built for it here, running them or not.
    """

    backend: str
    version: str | None
    devices: tuple[str, ...]
    targets: tuple[Target, ...]
    missing: tuple[str, ...]
    builds: bool = False


@dataclass(frozen=True, slots=True)
class _Backend:
    distributions: tuple[str, ...]
    extra: str
    device: str
    precisions: tuple[str, ...]
    runs_on: tuple[str, ...] = ()
    needs_nvidia: bool = False
    builds_anywhere: bool = False


_TENSORRT_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
_BACKENDS = {
    "onnxruntime": _Backend(
        ("onnxruntime", "onnxruntime-gpu"),
        "cpu",
        "cpu|cuda|tensorrt|tensorrt-rtx",
        ("fp32", "fp16", "int8"),
        runs_on=("cpu", "cuda", "tensorrt", "tensorrt-rtx"),
    ),
    "openvino": _Backend(
        ("openvino",), "openvino", "cpu|gpu|npu", ("fp32", "fp16", "bf16", "int8"), runs_on=("cpu", "gpu")
    ),
    "tensorrt-rtx": _Backend(
        ("tensorrt-rtx",), "tensorrt-rtx", _SM, _TENSORRT_PRECISIONS, needs_nvidia=True, builds_anywhere=True
    ),
    "tensorrt": _Backend(("tensorrt",), "tensorrt", _SM, _TENSORRT_PRECISIONS, needs_nvidia=True),
}
# Backends that run no ONNX, only what was built from it.
ENGINES_ONLY = frozenset(name for name, backend in _BACKENDS.items() if backend.needs_nvidia)
_RUNNABLE = tuple(f"{name}:{device}" for name, backend in _BACKENDS.items() for device in backend.runs_on)


def parse_target(text: str) -> Target:
    """A target from `auto`, `backend:device` or `backend:device:precision`, well-formed but perhaps not available.

    Raises:
        ArgumentError: an unknown backend, or a device or precision the backend has not.
    """
    if text == "auto":
        return _automatic()
    name, *rest = text.split(":")
    if name not in _BACKENDS:
        raise ArgumentError("target", "backend", got=text[:80], expected=f"auto or one of {', '.join(_BACKENDS)}")
    backend = _BACKENDS[name]
    if len(rest) not in (1, 2) or not re.fullmatch(backend.device, rest[0]):
        one_of = backend.device.replace("|", ", ")
        known = "sm75, sm80, sm86, sm89, sm120, sm121" if name == "tensorrt-rtx" else "sm89"  # of TensorRT-RTX 1.7
        devices = f"{known}, several as sm89+sm120, or portable" if backend.device == _SM else one_of
        raise ArgumentError("target", "device", got=text[:80], expected=f"{name}:DEVICE with DEVICE one of {devices}")
    if len(rest) == 2 and rest[1] not in backend.precisions:
        raise ArgumentError("target", "precision", got=text[:80], expected=f"one of {', '.join(backend.precisions)}")
    return Target(name, rest[0], precision=rest[1] if len(rest) == 2 else None)


def _automatic() -> Target:
    """The fastest target here that runs any bundle in the precision it was exported in."""
    if _runs_on_cuda():
        return Target("onnxruntime", "cuda", reason="ONNX Runtime has its CUDA provider, and an NVIDIA GPU is here")
    if not _is_importable("onnxruntime") and _is_importable("openvino"):
        return Target("openvino", "cpu", reason="OpenVINO is installed and ONNX Runtime is not")
    # In bf16 OpenVINO is faster yet; in fp32 it took 1.2 to 4 times as long (shapes family, AMD EPYC with AVX-512).
    return Target("onnxruntime", "cpu", reason="the fastest here that keeps the precision a bundle was exported in")


def _runs_on_cuda() -> bool:
    if not has_nvidia_driver() or not _is_importable("onnxruntime"):
        return False
    import onnxruntime  # noqa: PLC0415 (heavy)

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def check_runnable(target: Target) -> None:
    """Raise TargetError when this version of tandemrt cannot run bundles on `target`, or its device is not here."""
    if target.backend not in ENGINES_ONLY and target.device not in _BACKENDS[target.backend].runs_on:
        raise TargetError(
            "target",
            "this version of tandemrt cannot run bundles on it",
            got=str(target),
            expected=" or ".join(_RUNNABLE),
            remedy="Use --target auto.",
        )
    if target.backend == "openvino" and target.device != "cpu" and _is_importable("openvino"):
        from .backends.openvino import device_name  # noqa: PLC0415 (it imports this module)

        device_name(target.device)
    if _needs_nvidia(target) and not has_nvidia_driver():
        what = "needs an NVIDIA GPU, and no NVIDIA driver is running here"
        raise TargetError(f"target {target}", what, remedy="Use --target auto, or a machine with such a GPU.")


def _needs_nvidia(target: Target) -> bool:
    return _BACKENDS[target.backend].needs_nvidia or (target.backend == "onnxruntime" and target.device != "cpu")


def check_installed(target: Target) -> None:
    """Raise TargetError when the package that runs `target` is not installed; it is not imported."""
    if not _is_importable(target.backend.replace("-", "_")):
        raise TargetError(target.backend, "is not installed", remedy=f"Run `{install_hint(target.backend)}`.")


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # a module without a spec is imported already
        return True


def install_hint(backend: str, *, gpu: bool = False) -> str:
    """The command that installs what `backend` needs; gpu: for ONNX Runtime on NVIDIA GPUs."""
    return f'pip install "tandemrt[{"gpu" if gpu else _BACKENDS[backend].extra}]"'


def probe_backends() -> tuple[BackendStatus, ...]:
    """What is installed and usable of every backend; imports those that run here."""
    return tuple(_status(name, backend) for name, backend in _BACKENDS.items())


def _status(name: str, backend: _Backend) -> BackendStatus:
    versions = _installed_versions(backend.distributions)
    devices = nvidia_gpus() if backend.needs_nvidia else ()
    missing = []
    if not versions:
        missing.append(f"{name} is not installed: {install_hint(name)}")
    if len(versions) > 1:
        both = " and ".join(versions)
        missing.append(f"{both} overwrite each other's files: uninstall both, then {install_hint(name)}")
    if backend.needs_nvidia and not has_nvidia_driver():
        missing.append("no NVIDIA driver is running here")
    targets: tuple[Target, ...] = ()
    if not missing:
        try:
            devices, targets = _PROBES[name]()
        except TargetError as error:
            missing.append(str(error))
        except Exception as error:  # a damaged installation fails in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            missing.append(f"{name} is installed but cannot be imported ({reason}): reinstall it")
    builds = _is_importable("onnx") and (not missing or (backend.builds_anywhere and _imports(name)))
    return BackendStatus(name, next(iter(versions.values()), None), devices, targets, tuple(missing), builds)


def _imports(name: str) -> bool:
    from .backends.modules import imported  # noqa: PLC0415 (it imports this module)

    try:
        imported(name)
    except TargetError:
        return False
    return True


def _probed_onnxruntime() -> tuple[tuple[str, ...], tuple[Target, ...]]:
    import onnxruntime  # noqa: PLC0415 (heavy)

    from .backends.providers import devices_here  # noqa: PLC0415 (it imports this module)

    devices = devices_here(onnxruntime) if has_nvidia_driver() else ("cpu",)
    return tuple(onnxruntime.get_available_providers()), tuple(Target("onnxruntime", device) for device in devices)


def _probed_openvino() -> tuple[tuple[str, ...], tuple[Target, ...]]:
    import openvino  # noqa: PLC0415 (heavy)

    core = openvino.Core()
    precisions = (None, "bf16") if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else (None,)
    targets = [Target("openvino", "cpu", precision) for precision in precisions]
    if any(name.partition(".")[0] == "GPU" for name in core.available_devices):
        targets.append(Target("openvino", "gpu"))
    return tuple(core.available_devices), tuple(targets)


def _probed_tensorrt(name: str) -> tuple[tuple[str, ...], tuple[Target, ...]]:
    from .backends.cuda import devices  # noqa: PLC0415 (it imports this module)

    here = devices()
    architectures = dict.fromkeys(device.architecture for device in here)
    named = tuple(f"GPU {device.index}: {device.name} ({device.architecture})" for device in here)
    return named, tuple(Target(name, architecture) for architecture in architectures)


_PROBES: Mapping[str, Callable[[], tuple[tuple[str, ...], tuple[Target, ...]]]] = {
    "onnxruntime": _probed_onnxruntime,
    "openvino": _probed_openvino,
    **{name: functools.partial(_probed_tensorrt, name) for name in sorted(ENGINES_ONLY)},
}


def installed_version(backend: str) -> str:
    """The version of the installed package of `backend`.

    Raises:
        TargetError: it is not installed.
    """
    versions = _installed_versions(_BACKENDS[backend].distributions)
    if not versions:
        raise TargetError(backend, "is not installed", remedy=f"Run `{install_hint(backend)}`.")
    return next(iter(versions.values()))


def _installed_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    from importlib import metadata  # noqa: PLC0415 (a tenth of a second, for doctor alone)

    found = (next(iter(metadata.distributions(name=name)), None) for name in distributions)
    return {name: package.version for name, package in zip(distributions, found, strict=True) if package is not None}


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver runs here; containers may show its devices and not its /proc, WSL neither."""
    return bool(nvidia_gpus()) or any(path.exists() for path in _NVIDIA_DEVICES)


def nvidia_gpus() -> tuple[str, ...]:
    """The models of the NVIDIA GPUs whose driver is loaded, as the Linux driver names them."""
    models = []
    for information in sorted(_NVIDIA.glob("gpus/*/information")):
        found = re.search(r"^Model:\s*(.+)$", information.read_text("utf-8", "replace"), re.MULTILINE)
        models.append(found[1] if found else information.parent.name)
    return tuple(models)
