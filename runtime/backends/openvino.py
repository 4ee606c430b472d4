"""OpenVINO on the CPU or a GPU. A run reads and writes the binding's numpy arrays; on the CPU nothing is copied.

The model is compiled with the shapes its graph states, symbolic ones for every size at once: compiled anew for each
binding's shapes it ran some 5% faster (SD 1.5's UNet), but a second set of shapes takes its weights a second time.
Small models do so nevertheless for a second batch, see `_TWICE_BYTES`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..engine_search import Found
from ..errors import BundleError, ExecutionError, TargetError
from ..manifest import TensorSpec
from ..onnx_files import graph_tensors
from ..targets import Target
from .base import Array, Shape
from .buffers import Arrays, allocated, not_loaded, one_line, require_numpy_types
from .modules import imported
from .openvino_graph import read_graph

# What arithmetic is asked for. Left to itself, OpenVINO runs an fp32 graph in bf16 where the processor can.
_INFERENCE_PRECISIONS = {None: "f32", "fp32": "f32", "fp16": "f32", "bf16": "bf16", "int8": "f32", "fp8": "f32"}
# Every change of shapes from one run to the next is some 4 ms more for a UNet: as long as a small one takes by itself,
# and nothing beside the seconds of a large one. A model of no larger files runs a second batch on weights of its own.
_TWICE_BYTES = 64 << 20


class OpenVinoSession:
    """A model compiled by OpenVINO; see `Session`."""

    def __init__(
        self,
        name: str,
        compiled: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        compile_again: Callable[[], Any] | None = None,
        read_from: object = None,
    ) -> None:
        """Raises TargetError where a tensor is of a type that numpy has not.

        compile_again: makes a second model of a second batch; without it there is one. read_from: memory that the
        model goes on reading; it stays until the session and its bindings are gone.
        """
        self._name, self._ov = name, imported("openvino")
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._compiled: Any = compiled
        self._compile_again, self._second = compile_again, None
        self._read_from = read_from
        self._batch: Shape = ()
        self._lock = threading.Lock()
        require_numpy_types(name, (*self.inputs, *self.outputs))

    @classmethod
    def of_graph(
        cls,
        model: Path,
        target: Target,
        threads: int | None,
        streams: int = 1,
        unchanged: Callable[[], object] = lambda: None,
    ) -> OpenVinoSession:
        """Compile an ONNX model. Loaded by path, so external data is found beside it.

        unchanged: as of `open_session`.

        Raises:
            TargetError: OpenVINO is not installed, or did not grant the device or the precision.
            ExecutionError: OpenVINO cannot load the model.
        """
        name = model.parent.name

        def compile_graph(core: Any, configuration: Mapping[str, str]) -> Any:
            graph = read_graph(core, model, configuration["INFERENCE_PRECISION_HINT"], target.device)
            return core.compile_model(graph, target.device.upper(), configuration)

        imported("openvino")
        try:
            inputs, outputs = graph_tensors(model)
        except BundleError as error:
            raise not_loaded("OpenVINO", model, None, error) from error
        require_numpy_types(name, (*inputs, *outputs))
        granted = functools.partial(_granted, model, target, _threading(target.device, threads, streams), compile_graph)

        def grant_again() -> Any:
            unchanged()
            return granted()

        small = sum(file.stat().st_size for file in model.parent.iterdir()) <= _TWICE_BYTES
        return cls(name, granted(), inputs, outputs, grant_again if small else None)

    @classmethod
    def of_engine(cls, found: Found, target: Target, threads: int | None, streams: int = 1) -> OpenVinoSession:
        """Import a compiled model.

        Raises:
            TargetError: OpenVINO is not installed, or did not grant the device or the precision.
            ExecutionError: OpenVINO refuses the engine.
        """
        (file,) = found.engine.files
        path = found.folder / file

        mapped: Any = None

        def import_blob(core: Any, configuration: Mapping[str, str]) -> Any:
            nonlocal mapped
            mapped = np.memmap(path, np.uint8, "c")  # reading it would take longer than all the rest
            blob = imported("openvino").Tensor(mapped, shared_memory=True)
            return core.import_model(blob, target.device.upper(), configuration)

        name = found.engine.component
        compiled = _granted(path, target, _threading(target.device, threads, streams), import_blob, engine_of=name)
        return cls(name, compiled, found.engine.inputs, found.engine.outputs, read_from=mapped)

    def bind(self, input_shapes: Mapping[str, Shape]) -> OpenVinoBinding:
        """Allocate buffers for these input shapes; see `Session.bind`."""
        self._live()
        inputs, outputs = allocated(self._name, self.inputs, self.outputs, input_shapes, self._measured_output_shapes)
        return OpenVinoBinding(self, inputs, outputs)

    def close(self) -> None:
        """Free the model; a second call does nothing. A run in progress on another thread ends as usual."""
        self._compiled = self._second = None

    def request(self, arrays: Mapping[str, Array]) -> Any:
        """OpenVINO's request with these arrays as its tensors, inputs first."""
        request = self._of_batch(next(iter(arrays.values())).shape[:1]).create_infer_request()
        for name, array in arrays.items():
            request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
        return request

    def run(self, request: Any) -> None:
        """Run once; safe from many threads with a request each."""
        self._live()
        try:
            # `infer` would hand the outputs back as copies.
            request.start_async()
            request.wait()
        except Exception as error:  # OpenVINO raises plain RuntimeError
            raise ExecutionError(self._name, f"OpenVINO failed ({one_line(error)})") from error

    def require_shape(self, name: str, made: Shape, stated: Shape) -> None:
        """Raise ExecutionError when an output is not of the shape that the graph states."""
        if made != stated:
            raise ExecutionError(self._name, f"OpenVINO failed (shape of {name!r})", got=made, expected=str(stated))

    def _of_batch(self, batch: Shape) -> Any:
        with self._lock:
            first = self._live()
            self._batch = self._batch or batch
            if batch == self._batch or self._compile_again is None:
                return first
            if self._second is None:
                self._second = self._compile_again()
            return self._second

    def _live(self) -> Any:
        compiled = self._compiled
        if compiled is None:
            raise ExecutionError(self._name, "the model is closed", remedy="Open it again.")
        return compiled

    def _measured_output_shapes(self, inputs: Arrays) -> Sequence[Shape]:
        request = self.request(inputs)
        self.run(request)
        return [tuple(request.get_tensor(spec.name).shape) for spec in self.outputs]


class OpenVinoBinding:
    """A session with host buffers; see `Binding`."""

    def __init__(self, session: OpenVinoSession, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        self.inputs: Mapping[str, Array] = MappingProxyType(inputs)
        self.outputs: Mapping[str, Array] = MappingProxyType(outputs)
        self._session = session
        self._request = session.request({**inputs, **outputs})
        self._made = {name: self._request.get_tensor(name) for name in outputs}

    def run(self) -> None:
        """Run the model once; see `Binding.run`."""
        self._session.run(self._request)
        # A result smaller than its buffer would leave the rest as it was.
        for name, tensor in self._made.items():
            self._session.require_shape(name, tuple(tensor.shape), self.outputs[name].shape)


@functools.cache
def device_name(device: str) -> str:
    """The full name of a device that OpenVINO has here, such as `gpu`.

    Raises:
        TargetError: OpenVINO is not installed, or has no such device here.
    """
    core = imported("openvino").Core()
    here = {name.partition(".")[0].lower() for name in core.available_devices}
    if device not in here:
        expected = f"one of {', '.join(sorted(here))}"
        raise TargetError(f"target openvino:{device}", "device that is not here", got=device, expected=expected)
    return str(core.get_property(device.upper(), "FULL_DEVICE_NAME"))


def precision_hint(device: str, precision: str | None) -> str:
    """The arithmetic that is asked of a device: an fp16 graph is computed in fp32 by a CPU, as by ONNX Runtime's.

    What an int8 graph does not quantize is computed in bf16 where the CPU can: SDXS-512's UNet took 1.2 times as long
    in fp32, and was as far from the fp32 graph's numbers. So is all of an fp8 graph: what its rounding to E4M3 leaves
    is 16 times coarser than bf16.
    """
    if precision in ("int8", "fp8") and device == "cpu" and "BF16" in _cpu_capabilities():
        return "bf16"
    return "f16" if precision == "fp16" and device != "cpu" else _INFERENCE_PRECISIONS[precision]


@functools.cache
def _cpu_capabilities() -> frozenset[str]:
    return frozenset(imported("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def exact_products(device: str) -> dict[str, str]:
    """The setting with which a CPU computes products with weights in eight or four bits as the graph states.

    Left to itself OpenVINO rounds what they read to eight bits: SDXS-512's UNet, with such weights, was off by 1.7%.
    """
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if device == "cpu" else {}


def _threading(device: str, threads: int | None, streams: int) -> dict[str, str]:
    """OpenVINO's settings for so many runs at once, on a CPU on so many threads together."""
    if device != "cpu":
        return {"NUM_STREAMS": str(streams)}
    # A picture's models run one after the other, each on all threads. A pinned thread would wait for whatever else
    # runs on its core.
    settings = {"NUM_STREAMS": str(streams), "ENABLE_CPU_PINNING": "NO"}
    return settings if threads is None else {**settings, "INFERENCE_NUM_THREADS": str(threads)}


def _granted(
    path: Path,
    target: Target,
    threading: Mapping[str, str],
    load: Callable[[Any, Mapping[str, str]], Any],
    engine_of: str | None = None,
) -> Any:
    """What `load` makes of OpenVINO's core and a configuration, if it is what the target asks for."""
    ov, precision = imported("openvino"), precision_hint(target.device, target.precision)
    configuration = {"INFERENCE_PRECISION_HINT": precision, **exact_products(target.device), **threading}
    try:
        compiled = load(ov.Core(), configuration)
        granted = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        devices = compiled.get_property("EXECUTION_DEVICES")
    except TargetError:
        raise
    except Exception as error:  # OpenVINO raises plain RuntimeError
        raise not_loaded("OpenVINO", path, engine_of, error) from error
    if granted != precision:
        raise TargetError(
            engine_of or path.parent.name,
            f"precision of the arithmetic that OpenVINO granted for target {target}",
            got=granted,
            expected=precision,
            remedy=f"Ask for openvino:{target.device}:fp32, or use a device that computes so; `tandemrt doctor` lists "
            "what is here.",
        )
    asked = target.device.upper()
    if {name.partition(".")[0] for name in devices} != {asked}:
        raise TargetError(engine_of or path.parent.name, "devices granted", got=devices, expected=f"{asked} alone")
    return compiled
