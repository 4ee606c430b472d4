"""ONNX Runtime's execution providers: asked for by device, and what was granted compared with it."""

from __future__ import annotations

import contextlib
import io
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import TargetError
from ..targets import Target, install_hint
from .buffers import one_line

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
# Of the package onnxruntime-ep-nv-tensorrt-rtx 0.5, which ONNX Runtime loads from a library when it is told to.
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_RTX_DEVICE = "tensorrt-rtx"

# By device; a node that the first does not take goes to the next.
_PROVIDERS = {"cpu": (CPU,), "cuda": (CUDA,), "tensorrt": (TENSORRT, CUDA)}


def devices_here(ort: Any) -> tuple[str, ...]:
    """The devices whose providers are installed; a GPU's may still fail to load its libraries."""
    available = ort.get_available_providers()
    devices = tuple(device for device, names in _PROVIDERS.items() if set(names) <= set(available))
    return (*devices, _RTX_DEVICE) if find_spec(RTX_PLUGIN) is not None else devices


def opened(ort: Any, model: Path, options: Any, target: Target) -> Any:
    """A session on the providers of the target's device.

    Raises:
        TargetError: a provider is not there, or was not granted.
        Exception: what ONNX Runtime raises of a model that it cannot load.
    """
    names: tuple[str, ...]
    if target.device == _RTX_DEVICE:
        names = (_add_rtx_plugin(ort, options, target),)
        session = ort.InferenceSession(str(model), options)
    else:
        names = _PROVIDERS[target.device]
        _require_available(ort, target, names)
        session = ort.InferenceSession(
            str(model), options, providers=[(name, _options(name, target)) for name in names]
        )
    granted = tuple(session.get_providers())
    # What no other provider takes, arithmetic on shapes above all, ONNX Runtime's own CPU provider does.
    if granted not in (names, (*names, CPU)):
        raise TargetError(
            model.parent.name,
            "execution providers granted",
            got=list(granted),
            expected=f"{', '.join(names)} alone",
            remedy="" if names == (CPU,) else "Check that the libraries of the GPU's driver, CUDA and cuDNN are found.",
        )
    session.disable_fallback()
    return session


def _options(name: str, target: Target) -> dict[str, str]:
    if name == CUDA:
        return {"use_tf32": "0"}  # it would round an fp32 model's factors to 10 bits
    if name == TENSORRT:
        return {"trt_fp16_enable": str(int(target.precision == "fp16"))}
    return {}


def _require_available(ort: Any, target: Target, names: tuple[str, ...]) -> None:
    available = ort.get_available_providers()
    missing = [name for name in names if name not in available]
    if missing:
        raise TargetError(
            str(target),
            "execution provider that this ONNX Runtime has not",
            got=missing[0],
            expected=f"one of {', '.join(available)}",
            remedy=f"Run `pip uninstall onnxruntime`, then `{install_hint('onnxruntime', gpu=True)}`.",
        )
    if CUDA in names:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _add_rtx_plugin(ort: Any, options: Any, target: Target) -> str:
    """Ask for the provider on the first GPU it knows; returns its name."""
    try:
        plugin: Any = import_module(RTX_PLUGIN)
        name = str(plugin.get_ep_name())
        if not any(device.ep_name == name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    except Exception as error:  # a damaged installation fails in any way
        remedy = "Run `pip install onnxruntime-ep-nv-tensorrt-rtx` beside onnxruntime 1.24 or newer."
        what = f"its provider cannot be loaded ({one_line(error)})"
        raise TargetError(str(target), what, remedy=remedy) from error
    if not devices:
        raise TargetError(str(target), "its provider finds no GPU", expected="an NVIDIA RTX GPU, Ampere or newer")
    options.add_provider_for_devices(devices[:1], {})
    return name
