"""Stand-ins for engines of TensorRT, of which ONNX Runtime computes the graph, and for what refits them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from tandemrt.engines.cache import records_of
from tandemrt.engines.composed import composed
from tandemrt.engines.graph_files import write_graph
from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime.backends.buffers import allocated
from tandemrt.runtime.backends.refit import Refit
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cache import engines_folder
from tandemrt.runtime.engine_files import FORMAT, SIDECAR_NAME, Engine
from tandemrt.runtime.engine_search import Found
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import PLAIN, UPDATE

TARGET = "tensorrt-rtx:sm89"


class Refitter:
    """Stands for TensorRT's: `engine` is a dictionary of weights; `a` takes `b` with it. `fails` may be set."""

    fails = ""

    def __init__(self, engine: dict[str, Any], log: Any) -> None:
        self.engine, self.log, self.new = engine, log, dict[str, Any]()

    def get_all_weights(self) -> list[str]:
        return list(self.engine)

    def get_missing_weights(self) -> list[str]:
        return ["b"] if "a" in self.new and "b" not in self.new else []

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.new[name] = weights.copy()
        return bool(weights.shape == self.engine[name].shape)

    def refit_cuda_engine(self) -> bool:
        """Refit, or put what is at hand anywhere and say no."""
        if Refitter.fails and Refitter.fails in self.new:
            self.engine[Refitter.fails] = np.zeros_like(self.engine[Refitter.fails])
            self.log.messages = ["it was told to"]
            return False
        self.engine.update(self.new)
        return True


TRT = SimpleNamespace(Refitter=Refitter, Weights=lambda array: array)


def put(
    bundle: Bundle, cache: Path, *components: str, profile: str = "64x64:b1", target: str = TARGET, **options: Any
) -> list[str]:
    """Have engines in a cache that nothing was built for; returns their keys.

    Update engines are left out: what stands for a GPU here hands nothing on.
    """
    plan = BuildPlan(bundle.path, (parse_target(target),), cache, components, (parse_profile(profile),), **options)
    return [_put(one, cache) for one in requests_of(plan, bundle) if one.ingredients.variant != UPDATE]


def _put(request: Request, cache: Path) -> str:
    engines = engines_folder(cache)
    engines.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = engines / request.key
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "engine.plan").write_bytes(b"stands for an engine")
    engine = Engine(
        format=FORMAT,
        component=request.component,
        ingredients=request.ingredients,
        files=records_of(folder, ("engine.plan",)),
        inputs=request.facts.inputs,
        outputs=request.facts.outputs,
        profile_names=request.profile_names,
        build_s=0.0,
        peak_memory_bytes=0,
        versions={},
    )
    (folder / SIDECAR_NAME).write_bytes(msgspec.json.encode(engine))
    return request.key


class StandIn:
    """An engine's graph with weights that can be others, run by ONNX Runtime."""

    refits = 0

    def __init__(self, bundle: Bundle, found: Found, folder: Path) -> None:
        engine, model = found.engine, bundle.model_path(found.engine.component)
        self.inputs, self.outputs, self._name = engine.inputs, engine.outputs, engine.component
        variant = engine.ingredients.variant
        if variant != PLAIN:
            model = write_graph(
                composed(model, variant, self._name, hands=True), folder / found.folder.name, model.parent
            )
        self._model = onnx.load(model)
        self._weights = {one.name: numpy_helper.to_array(one) for one in self._model.graph.initializer}
        self._refit = Refit(TRT, SimpleNamespace(messages=[]), self._name)
        self._running, self._lock = 0, threading.Lock()
        self._load()

    def refit(self, base: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
        assert not self._running, "refitted while it runs"
        StandIn.refits += 1
        try:
            self._refit.apply(self._weights, base, changes)
        finally:
            self._load()

    def bind(self, input_shapes: Mapping[str, tuple[int, ...]]) -> Any:
        def measured(given: Mapping[str, Any]) -> list[tuple[int, ...]]:
            return [one.shape for one in self._session.run(None, dict(given))]

        inputs, outputs = allocated(self._name, self.inputs, self.outputs, input_shapes, measured)

        def run() -> None:
            with self._lock:
                self._running += 1
            for name, values in zip(outputs, self._session.run(list(outputs), inputs), strict=True):
                outputs[name][...] = values
            with self._lock:
                self._running -= 1

        return SimpleNamespace(inputs=inputs, outputs=outputs, run=run)

    def close(self) -> None:
        """There is nothing to free."""

    def _load(self) -> None:
        for tensor in self._model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(self._weights[tensor.name], tensor.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._model.SerializeToString(), options)
