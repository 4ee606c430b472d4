"""ONNX Runtime. On the CPU a run reads and writes the binding's numpy arrays in place, nothing is copied; on a GPU
the binding has buffers there too, filled before the run and read after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ExecutionError, TargetError
from ..manifest import Dtype, TensorSpec
from ..targets import Target
from .base import Array, Shape
from .buffers import allocated, not_loaded, one_line
from .modules import imported
from .providers import opened

# Devices whose memory ONNX Runtime lets us fill and read; for others it copies host buffers itself.
_BUFFERS_ON = {"cuda": "cuda", "tensorrt": "cuda"}
# A session option: products with weights that are dequantized are computed in the type that the graph states.
EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "0")
_FATAL = 4  # of ONNX Runtime's log severities; what goes wrong is raised as an exception as well
_E4M3 = "float8e4m3fn"
# What numpy can hold: bfloat16 it cannot.
_DTYPES: dict[str, Dtype] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What a run is given: ONNX Runtime's binding, and the buffers on a device with the arrays they mirror."""

    io: Any
    given: tuple[tuple[Any, Array], ...] = ()
    made: tuple[tuple[Any, Array], ...] = ()


class OnnxRuntimeSession:
    """An ONNX model on ONNX Runtime; see `Session`. Loaded by path, so external data is found beside the model."""

    def __init__(self, model: Path, target: Target, threads: int | None, *, engine_of: str | None = None) -> None:
        """Load `model`.

        engine_of: of an engine the component it was built from; a bundle's graph is in a folder of that name.

        Raises:
            TargetError: ONNX Runtime is not installed, or did not grant the provider.
            ExecutionError: ONNX Runtime cannot load the model.
        """
        self._name = engine_of or model.parent.name
        self._runs_on = "ONNX Runtime" if engine_of is None else f"ONNX Runtime, on the engine in {model.parent},"
        self._ort = imported("onnxruntime")
        self._memory = _BUFFERS_ON.get(target.device, "cpu")
        self._session = _loaded(self._ort, model, target, threads, engine_of)
        self.inputs = tuple(self._spec(node, target) for node in self._session.get_inputs())
        self.outputs = tuple(self._spec(node, target) for node in self._session.get_outputs())

    def bind(self, input_shapes: Mapping[str, Shape]) -> OnnxRuntimeBinding:
        """Allocate buffers for these input shapes; see `Session.bind`."""
        inputs, outputs = allocated(self._name, self.inputs, self.outputs, input_shapes, self._measured_output_shapes)
        return OnnxRuntimeBinding(self, inputs, outputs)

    def close(self) -> None:
        """Free the model; a second call does nothing. A run in progress on another thread ends as usual."""
        self._session = None

    def buffers(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array] | None) -> _Buffers:
        """What a run on these arrays is given; ONNX Runtime allocates the outputs itself where `outputs` is None."""
        io = self._live().io_binding()
        on_device = self._memory != "cpu"
        given = tuple((self._value(array), array) for array in inputs.values())
        for name, (value, _) in zip(inputs, given, strict=True):
            io.bind_ortvalue_input(name, value)
        made = tuple((self._value(outputs[spec.name]), outputs[spec.name]) for spec in self.outputs) if outputs else ()
        for spec, (value, _) in zip(self.outputs, made, strict=False):
            io.bind_ortvalue_output(spec.name, value)
        for spec in self.outputs[len(made) :]:
            io.bind_output(spec.name, "cpu")
        return _Buffers(io, given, made) if on_device else _Buffers(io)

    def run(self, buffers: _Buffers) -> None:
        """Run once; safe from many threads with `buffers` each."""
        session = self._live()
        options = self._ort.RunOptions()
        options.log_severity_level = _FATAL
        try:
            for value, array in buffers.given:
                value.update_inplace(array)
            session.run_with_iobinding(buffers.io, options)
            for value, array in buffers.made:
                array[...] = value.numpy()
        except Exception as error:  # ONNX Runtime raises plain RuntimeError and its own classes
            raise ExecutionError(self._name, f"{self._runs_on} failed ({one_line(error)})") from error

    def _value(self, array: Array) -> Any:
        """The array itself on the CPU, a copy of it on a GPU."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)

    def _live(self) -> Any:
        session = self._session
        if session is None:
            raise ExecutionError(self._name, "the model is closed", remedy="Open it again.")
        return session

    def _spec(self, node: Any, target: Target) -> TensorSpec:
        if node.type not in _DTYPES:
            raise TargetError(
                self._name, f"type of {node.name!r}", got=node.type, expected=f"one of {', '.join(_DTYPES)} on {target}"
            )
        shape = tuple(size if size is not None else f"{node.name}_{axis}" for axis, size in enumerate(node.shape))
        return TensorSpec(name=node.name, dtype=_DTYPES[node.type], shape=shape)

    def _measured_output_shapes(self, inputs: Mapping[str, Array]) -> list[Shape]:
        buffers = self.buffers(inputs, None)
        self.run(buffers)
        return [tuple(value.shape()) for value in buffers.io.get_outputs()]


class OnnxRuntimeBinding:
    """A session with host buffers; see `Binding`."""

    def __init__(self, session: OnnxRuntimeSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.inputs: Mapping[str, Array] = MappingProxyType(inputs)
        self.outputs: Mapping[str, Array] = MappingProxyType(outputs)
        self._session = session
        self._buffers = session.buffers(inputs, outputs)

    def run(self) -> None:
        """Run the model once; see `Binding.run`."""
        self._session.run(self._buffers)


def session_options(ort: Any, threads: int | None) -> Any:
    """What a session is opened with; threads: of its pool, the caller's among them, ONNX Runtime's choice for None."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.use_deterministic_compute = True
    options.intra_op_num_threads = threads or 0
    # Every model has its own threads: spinning ones would take the cores from the model that runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The file's name must not choose its parser: ONNX Runtime would read its own flatbuffer format from an .ort file.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Products with weights in 8 or 4 bits would be computed in int8, which nothing asked for.
    options.add_session_config_entry(*EXACT_PRODUCTS)
    return options


def with_pairs_of_e4m3(options: Any, load: Callable[[], Any]) -> Any:
    """What `load` makes with the options; where E4M3 keeps it from that, with pairs of Q/DQ left as they are.

    ONNX Runtime takes pairs of E4M3 for those of int8, and joins them to products of whole numbers, which it then
    refuses.
    """
    try:
        return load()
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        if _E4M3 not in str(error):
            raise
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return load()


def _loaded(ort: Any, model: Path, target: Target, threads: int | None, engine_of: str | None) -> Any:
    options = session_options(ort, threads)
    try:
        return with_pairs_of_e4m3(options, lambda: opened(ort, model, options, target))
    except TargetError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise not_loaded("ONNX Runtime", model, engine_of, error) from error
