"""Other weights in a TensorRT engine that was built for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import EngineError, ExecutionError
from .base import Array
from .tensorrt_log import last_said


class Refit:
    """Which of an engine's weights are not the base's, and how they become others.

    Every weight is made from the base's anew, so that neither changes nor their roundings add up.
    """

    def __init__(self, trt: Any, log: Any, name: str) -> None:
        self._trt, self._log, self._name = trt, log, name
        self._changed: frozenset[str] = frozenset()

    def apply(self, engine: Any, base: Mapping[str, Array], changes: Mapping[str, Array]) -> None:
        """Give the engine the base's weights with these changes; see `TensorRtSession.refit`, also for what is raised.

        Nothing may run meanwhile.
        """
        refitter = self._trt.Refitter(engine, self._log)
        self._require(changes.keys(), set(refitter.get_all_weights()), "weights to refit")
        touched = sorted(self._changed | changes.keys())
        self._require(touched, base.keys(), "weights to refit")
        given = [self._set(refitter, name, base[name], changes.get(name)) for name in touched]
        # What is compiled together is refitted together.
        together = refitter.get_missing_weights()
        self._require(together, base.keys(), "weights that are refitted with them")
        given += [self._set(refitter, name, base[name], None) for name in together]
        self._changed |= changes.keys()  # should it fail, anything of these may be in place
        if not refitter.refit_cuda_engine():
            raise self._failed("it cannot be refitted")
        del given  # TensorRT has read them only now
        self._changed = frozenset(changes)

    def _require(self, names: Iterable[str], known: Collection[str], what: str) -> None:
        unknown = sorted(name for name in names if name not in known)
        if unknown:
            remedy = "Build it with --lora-slots instead."
            raise EngineError(self._name, what, got=unknown[:5], expected="those of its graph", remedy=remedy)

    def _set(self, refitter: Any, name: str, base: Array, change: Array | None) -> Array:
        """Hand over one weight, the base's with its change, rounded once; returns what must live until the refit."""
        values = base
        if change is not None:
            if change.shape != base.shape:
                what, expected = f"shape of the change of weight {name!r}", str(base.shape)
                raise ExecutionError(self._name, what, got=change.shape, expected=expected)
            with np.errstate(over="ignore"):
                values = (base.astype(np.float32) + change).astype(base.dtype)
            if not np.isfinite(values).all():
                expected = f"finite numbers in {base.dtype}"
                raise ExecutionError(self._name, f"LoRAs in weight {name!r}", got="NaN or Inf", expected=expected)
        values = np.ascontiguousarray(values)
        if not refitter.set_named_weights(name, self._trt.Weights(values)):
            raise self._failed(f"weight {name!r} of shape {values.shape} is refused")
        return values

    def _failed(self, what: str) -> ExecutionError:
        return ExecutionError(self._name, f"TensorRT failed: {what} ({last_said(self._log)})")
