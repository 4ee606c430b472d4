"""Where a target departs from what a component's graph means: value by value against ONNX Runtime in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from ..runtime.backends import target_here
from ..runtime.backends.base import Array
from ..runtime.bundle import Bundle
from ..runtime.engine_files import GRAPH_NAME, Shape, check_engine_files
from ..runtime.engine_search import Found, fitting_engines
from ..runtime.engine_session import Loader
from ..runtime.errors import EngineError
from ..runtime.manifest import Frozen
from ..runtime.targets import ENGINES_ONLY, Target, check_installed, check_runnable
from .graph_files import read_graph
from .job import Progress
from .layer_graphs import Value, batches, giving, values_of
from .layer_inputs import recorded_inputs
from .layer_parts import Part, boundaries, check_part_files, part_making, write_part
from .layer_runners import quietly, reference_runner, require_polygraphy, session_runner, target_runner
from .retyped import write_retyped

# float32: what engines are held to. float16: what exports are held to; bfloat16 has three bits less. A quantized value
# that falls to the other side of a step is off by one in 127, and so on through the layers.
THRESHOLDS: Mapping[str, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 16e-2, "int8": 25e-2, "fp8": 25e-2}
BATCH_BYTES = 512 << 20
WORST = 5
# A mask's "never" is the least number of its type: another type's is as good, and so is infinity.
_AS_GOOD_AS_INFINITE = 1e38


class Difference(Frozen, frozen=True, kw_only=True):
    """How far a value on the target is from the reference: the largest difference over the reference's largest number.

    relative_error: None where there is NaN or Inf and the reference has a number, or the other way round.
    """

    tensor: str
    node: str
    op: str
    shape: Shape
    relative_error: float | None


class LayerReport(Frozen, frozen=True, kw_only=True):
    """What was found of one component.

    engine: the folder of the compiled engine that ran as a whole, where there is one. outputs: the component's own, as
    a pipeline would run it, nothing in between read. compared: how many values between were compared.
    first: the first of them, in the order of the graph, over the threshold. worst: those with the largest error.
    part: what was cut out of the graph for the first one, where that was asked for.
    """

    component: str
    target: str
    precision: str
    threshold: float
    engine: str | None
    outputs: tuple[Difference, ...]
    compared: int
    first: Difference | None
    worst: tuple[Difference, ...]
    part: Part | None = None

    @property
    def diverges(self) -> bool:
        """Whether anything is over the threshold."""
        return self.first is not None or any(exceeds(one, self.threshold) for one in self.outputs)


def exceeds(difference: Difference, threshold: float) -> bool:
    """Whether a difference is over a threshold; NaN and Inf are over every one."""
    return difference.relative_error is None or difference.relative_error > threshold


def compare_layers(
    bundle: Bundle,
    name: str,
    target: Target,
    size: tuple[int, int] | None,
    progress: Progress,
    extract: Path | None = None,
) -> LayerReport:
    """Run component `name` on a target and, in float32, on ONNX Runtime, and compare all values on the way.

    Both get what the component is given in a short generation. A target's values are read a few at a time, which bounds
    memory; reading a value keeps a backend from fusing what makes it with what uses it.

    size: (width, height) in pixels of that generation; the bundle's default otherwise.
    extract: where to write the smallest part of the graph that makes the first diverging value wrongly by itself.

    Raises:
        ArgumentError: a part cannot be written there.
        TargetError: the target, or Polygraphy, is not available here.
        TandemError: the component cannot be run.
    """
    require_polygraphy()
    if extract is not None:
        check_part_files(extract)
    component, defaults = bundle.component(name), bundle.manifest.defaults
    asked = target.of_component(component)
    asked.check_precision(name, component.precision)
    check_runnable(asked)
    check_installed(asked)
    if asked.backend in ENGINES_ONLY:
        asked = target_here(asked)
    progress(f"{name}: inputs", 0, 1)
    feeds = recorded_inputs(bundle, name, size or (defaults.width, defaults.height))
    with tempfile.TemporaryDirectory(prefix="tandemrt-") as folder, quietly(name):
        comparison = _Comparison(bundle, name, asked, feeds, Path(folder))
        outputs = comparison.outputs()
        found = tuple(comparison.between(progress))
        threshold = THRESHOLDS[asked.precision or component.precision]
        first = next((one for one in found if exceeds(one, threshold)), None)
        part = comparison.extracted(first.tensor, threshold, extract) if first and extract else None
    return LayerReport(
        component=name,
        target=str(asked),
        precision=asked.precision or component.precision,
        threshold=threshold,
        engine=None if comparison.engine is None else str(comparison.engine.folder),
        outputs=outputs,
        compared=len(found),
        first=first,
        worst=tuple(sorted(found, key=_badness, reverse=True)[:WORST]),
        part=part,
    )


class _Comparison:
    """A component's graph on both sides, each in a folder of its own with its weights beside it."""

    def __init__(self, bundle: Bundle, name: str, target: Target, feeds: Mapping[str, Array], folder: Path) -> None:
        self._bundle, self._name, self._target, self._feeds = bundle, name, target, feeds
        self._shapes = {one: array.shape for one, array in feeds.items()}
        self.engine = _engine(bundle, name, target, self._shapes)
        own = bundle.model_path(name)
        compiled = self.engine.folder / own.name if self.engine and target.backend == "onnxruntime" else own
        self._meant = self._compiled = folder / "meant"
        self._meant_graph = self._compiled_graph = _moved(own, TensorProto.FLOAT, self._meant)
        if compiled != own or bundle.component(name).precision != "fp32":
            self._compiled = folder / "compiled"
            in_bfloat16 = target.precision == "bf16" and target.backend in ENGINES_ONLY
            self._compiled_graph = _moved(compiled, TensorProto.BFLOAT16 if in_bfloat16 else None, self._compiled)
        self._types = {one.name: one for one in values_of(self._compiled_graph, self._shapes)}
        if compiled != own:  # of ONNX Runtime's own operators ONNX infers no types
            graphs = (read_graph(own).graph, self._compiled_graph.graph)
            stated = {one.name: one.type.tensor_type.elem_type for graph in graphs for one in graph.value_info}
            meant = values_of(self._meant_graph, self._shapes)
            self._types = {one.name: replace(one, elem_type=stated.get(one.name, one.elem_type)) for one in meant}

    def outputs(self) -> tuple[Difference, ...]:
        """The component's outputs, as a pipeline would run it."""
        runner = session_runner(Loader(self._bundle, self._name, self._target).session, str(self._target))
        meant = {value.name: value for value in values_of(self._meant_graph, self._shapes)}
        values = [meant[spec.name] for spec in self._bundle.component(self._name).outputs]
        return tuple(_differences(values, self._expected(values), _ran(runner, self._feeds)))

    def between(self, progress: Progress) -> Iterator[Difference]:
        """All floating-point values that nodes make on both sides, in the order of the bundle's graph."""
        made = {result for node in self._compiled_graph.graph.node for result in node.output}
        values = [one for one in values_of(self._meant_graph, self._shapes) if one.name in made & self._types.keys()]
        groups = list(batches(values, BATCH_BYTES))
        for done, group in enumerate(groups):
            progress(f"{self._name}: layers", done, len(groups))
            expected = self._expected(group)
            shapes = {one: array.shape for one, array in expected.items()}
            model = giving(self._compiled_graph, [self._types[one.name] for one in group], shapes)
            runner = target_runner(_written(model, self._compiled), self._target, self._feeds)
            yield from _differences(group, expected, _ran(runner, self._feeds))
        progress(f"{self._name}: layers", len(groups), len(groups))

    def extracted(self, tensor: str, threshold: float, path: Path) -> Part:
        """Write the smallest part of the target's graph that makes `tensor` wrongly from the reference's values.

        Where none does, since errors add up on the way, it is all that makes it.
        """
        meant = {one.name: one for one in values_of(self._meant_graph, self._shapes)}
        readable = {name: self._types[name] for name in meant.keys() & self._types.keys()}
        for names in boundaries(self._compiled_graph, tensor, readable):
            expected = self._expected([meant[name] for name in (*sorted(names), tensor)])
            shapes = {**self._shapes, **{name: array.shape for name, array in expected.items()}}
            boundary = {name: readable[name] for name in names}
            part = part_making(self._compiled_graph, self._types[tensor], boundary, shapes)
            known = {**self._feeds, **{name: expected[name].astype(_numpy_type(one)) for name, one in boundary.items()}}
            feeds = {one.name: known[one.name] for one in part.graph.input}
            runner = target_runner(_written(part, self._compiled), self._target, feeds)
            (off,) = _differences([meant[tensor]], expected, _ran(runner, feeds))
            if exceeds(off, threshold):
                break
        inputs = write_part(part, self._compiled, feeds, path)
        nodes, error = len(part.graph.node), off.relative_error
        return Part(graph=str(path), inputs=str(inputs), nodes=nodes, relative_error=error)

    def _expected(self, values: Sequence[Value]) -> Mapping[str, Array]:
        return _ran(reference_runner(_written(giving(self._meant_graph, values, {}), self._meant)), self._feeds)


def _numpy_type(value: Value) -> Any:
    return np.float16 if value.elem_type == TensorProto.FLOAT16 else np.float32


def _moved(model: Path, to: int | None, folder: Path) -> onnx.ModelProto:
    """A graph in the type `to` whose weights lie in `folder`, so that copies of it are small."""
    return read_graph(write_retyped(read_graph(model), to, folder, model.parent))


def _written(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / GRAPH_NAME
    path.write_bytes(model.SerializeToString())
    return path


def _engine(bundle: Bundle, name: str, target: Target, shapes: Mapping[str, Shape]) -> Found | None:
    """The compiled engine in the cache that a pipeline would run, if there is one."""
    try:
        found = fitting_engines(bundle, name, target, shapes)[0]
        check_engine_files(found.folder, found.engine)
    except EngineError:
        return None
    return found


def _ran(runner: Any, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    with runner:
        given = runner.get_input_metadata(use_numpy_dtypes=False)
        made: Mapping[str, Array] = runner.infer({name: feeds[name] for name in given}, check_inputs=False)
        return made


def _differences(
    values: Sequence[Value], meant: Mapping[str, Array], found: Mapping[str, Array]
) -> Iterator[Difference]:
    for value in values:
        expected, got = meant[value.name], np.asarray(found[value.name])
        yield Difference(
            tensor=value.name,
            node=value.node,
            op=value.kind,
            shape=tuple(expected.shape),
            relative_error=relative_error(got, expected),
        )


def relative_error(found: Array, expected: Array) -> float | None:
    """The largest difference over the largest number of `expected`; None where only one of them is finite somewhere."""
    if not expected.size:
        return 0.0
    found = found.astype(np.float32, copy=False)
    endless = ~(np.abs(expected) < _AS_GOOD_AS_INFINITE)
    if found.shape != expected.shape or not np.array_equal(endless, ~(np.abs(found) < _AS_GOOD_AS_INFINITE)):
        return None
    numbers, others = expected[~endless], found[~endless]
    if not numbers.size:
        return 0.0
    largest, difference = float(np.abs(numbers).max()), float(np.abs(numbers - others).max())
    return difference / largest if largest else (None if difference else 0.0)


def _badness(difference: Difference) -> float:
    return float("inf") if difference.relative_error is None else difference.relative_error
