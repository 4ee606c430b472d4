"""ONNX Runtime's CPU provider. A run reads and writes the binding's numpy arrays in place, nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ExecutionError, TargetError
from ..manifest import Dtype, TensorSpec
from ..targets import Target, install_hint
from .base import Array, Shape
from .buffers import allocated, one_line

_PROVIDERS = {"cpu": "CPUExecutionProvider"}
_FATAL = 4  # of ONNX Runtime's log severities; what goes wrong is raised as an exception as well
# What numpy can hold: bfloat16 it cannot.
_DTYPES: dict[str, Dtype] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


class OnnxRuntimeSession:
    """An ONNX model on ONNX Runtime; see `Session`. Loaded by path, so external data is found beside the model."""

    def __init__(self, model: Path, target: Target, threads: int | None) -> None:
        """Load `model`.

        Raises:
            TargetError: ONNX Runtime is not installed, or did not grant the provider.
            ExecutionError: ONNX Runtime cannot load the model.
        """
        self._name = model.parent.name
        self._ort = _onnxruntime()
        self._session = _loaded(self._ort, model, target, threads)
        self.inputs = tuple(self._spec(node, target) for node in self._session.get_inputs())
        self.outputs = tuple(self._spec(node, target) for node in self._session.get_outputs())

    def bind(self, input_shapes: Mapping[str, Shape]) -> OnnxRuntimeBinding:
        """Allocate buffers for these input shapes; see `Session.bind`."""
        inputs, outputs = allocated(self._name, self.inputs, self.outputs, input_shapes, self._measured_output_shapes)
        return OnnxRuntimeBinding(self, inputs, outputs)

    def close(self) -> None:
        """Free the model; a second call does nothing. A run in progress on another thread ends as usual."""
        self._session = None

    def io_binding(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array] | None) -> Any:
        """ONNX Runtime's binding of these arrays; outputs it allocates itself where `outputs` is None."""
        io = self._live().io_binding()
        from_numpy = self._ort.OrtValue.ortvalue_from_numpy
        for name, array in inputs.items():
            io.bind_ortvalue_input(name, from_numpy(array))
        for spec in self.outputs:
            if outputs is None:
                io.bind_output(spec.name, "cpu")
            else:
                io.bind_ortvalue_output(spec.name, from_numpy(outputs[spec.name]))
        return io

    def run(self, io: Any) -> None:
        """Run once with an `io_binding`; safe from many threads with a binding each."""
        session = self._live()
        options = self._ort.RunOptions()
        options.log_severity_level = _FATAL
        try:
            session.run_with_iobinding(io, options)
        except Exception as error:  # ONNX Runtime raises plain RuntimeError and its own classes
            raise ExecutionError(self._name, f"ONNX Runtime failed ({one_line(error)})") from error

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
        io = self.io_binding(inputs, None)
        self.run(io)
        return [tuple(value.shape()) for value in io.get_outputs()]


class OnnxRuntimeBinding:
    """A session with host buffers; see `Binding`."""

    def __init__(self, session: OnnxRuntimeSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.inputs: Mapping[str, Array] = MappingProxyType(inputs)
        self.outputs: Mapping[str, Array] = MappingProxyType(outputs)
        self._session = session
        self._io = session.io_binding(inputs, outputs)

    def run(self) -> None:
        """Run the model once; see `Binding.run`."""
        self._session.run(self._io)


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 (heavy, and of an extra)
    except Exception as error:  # a damaged installation fails in any way
        raise TargetError(
            "onnxruntime", f"cannot be imported ({one_line(error)})", remedy=f"Run `{install_hint('onnxruntime')}`."
        ) from error
    return onnxruntime


def _loaded(ort: Any, model: Path, target: Target, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.use_deterministic_compute = True
    options.intra_op_num_threads = threads or 0
    # Every model has its own threads: spinning ones would take the cores from the model that runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The file's name must not choose its parser: ONNX Runtime would read its own flatbuffer format from an .ort file.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    provider = _PROVIDERS[target.device]
    try:
        session = ort.InferenceSession(str(model), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        remedy = "Check it with `tandemrt verify`, or try a newer onnxruntime."
        raise ExecutionError(
            str(model), f"ONNX Runtime cannot load the model ({one_line(error)})", remedy=remedy
        ) from error
    granted = session.get_providers()
    if granted != [provider]:
        raise TargetError(model.parent.name, "execution providers granted", got=granted, expected=f"{provider} alone")
    session.disable_fallback()
    return session
