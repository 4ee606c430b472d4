"""What each model of a generation really ran on: an engine, or the bundle's own graph, and why not on an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from .backends.base import Binding, Session, Shape
from .engine_search import Found
from .pool import Lease, Pool
from .targets import ENGINES_ONLY, Target


@dataclass(frozen=True, slots=True)
class RanOn:
    """What a model ran on.

    engine: the engine's key in the cache, None for the bundle's own graph. variant: what the engine was made as.
    refused: why not on an engine, or not on the one that comes first, where the cache had one, and what helps;
        otherwise empty.
    unasked: why the request, as it was asked for, is for no step engines, or none of the update engines, where the
        cache has some; otherwise empty.
    gpu: of an engine of TensorRT's the GPU, by CUDA's index.
    """

    engine: str | None = None
    variant: str = ""
    refused: tuple[str, ...] = ()
    gpu: int | None = None
    unasked: str = ""

    def __str__(self) -> str:
        if self.engine is None:
            return "graph"
        variant = "" if self.variant == "plain" else f" ({self.variant})"
        return f"engine {self.engine[:12]}{variant}" + ("" if self.gpu is None else f" on GPU {self.gpu}")


def engine_run(found: Found, target: Target, refused: Sequence[str], *, refitted: bool) -> RanOn:
    """An engine of the cache on the first device of a target, perhaps with LoRAs in its weights; see `RanOn`."""
    gpu = target.gpus[0] if target.backend in ENGINES_ONLY else None
    variant = found.engine.ingredients.variant.told(refitted=refitted)
    return RanOn(found.folder.name, variant, tuple(refused), gpu)


def with_remedies(refused: Mapping[str, str]) -> tuple[str, ...]:
    """Reasons as `RanOn.refused` has them: each remedy once, after the last reason that it helps against.

    refused: remedies by reasons, "" where there is none.
    """
    last = {remedy: why for why, remedy in refused.items() if remedy}
    return tuple(f"{why}. {remedy}" if last.get(remedy) == why else why for why, remedy in refused.items())


GRAPH = RanOn()


@runtime_checkable
class Choosing(Protocol):
    """A session that chooses among engines, by the shapes of a call."""

    def serving(self, shapes: Mapping[str, Shape]) -> Session:
        """The session for a call of these shapes, those of LoRA slots left out; its inputs may be others."""

    def ran_on(self, shapes: Mapping[str, Shape]) -> RanOn:
        """What a binding of these shapes runs on."""


def serving(session: Session, shapes: Mapping[str, Shape]) -> Session:
    """See `Choosing.serving`; of a session that chooses nothing, itself."""
    return session.serving(shapes) if isinstance(session, Choosing) else session


class Ran:
    """What the models of one generation ran on, by component; used by one thread at a time.

    lease: has the bindings of its sessions, by default none that outlive it.
    tried: see `Timings`.
    """

    def __init__(self, lease: Lease | None = None) -> None:
        self.lease = lease or Pool().lease()
        self.tried: Mapping[str, float] = {}
        self._ran: dict[str, dict[RanOn, None]] = {}
        self._refused: dict[str, tuple[str, ...]] = {}
        self._unasked: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, ran_on: RanOn) -> None:
        """Component `name` runs on this, for one kind of its calls."""
        self._ran.setdefault(name, {})[ran_on] = None

    def refuse(self, name: str, reasons: Sequence[str]) -> None:
        """Why component `name` runs on none of its step engines, or update engines, where the cache has some."""
        self._refused[name] = (*self._refused.get(name, ()), *reasons)

    def leave(self, name: str, why: str) -> None:
        """Why the request is for none of the step engines, or update engines, that the cache has of `name`."""
        self._unasked[name] = (*self._unasked.get(name, ()), why)

    def join(self, other: Ran) -> None:
        """Add all that another has."""
        for name, ran in list(other._ran.items()):
            for one in list(ran):
                self.add(name, one)

    def watched(self, name: str, session: Session) -> Session:
        """A session that adds what its bindings run on."""
        return _Watched(name, session, self)

    def by_component(self) -> dict[str, tuple[RanOn, ...]]:
        """What each component ran on, in the order of their first calls; several where calls differed in shape."""
        return {
            name: tuple(
                replace(
                    one,
                    refused=(*self._refused.get(name, ()), *one.refused),
                    unasked="; ".join(self._unasked.get(name, ())),
                )
                for one in ran
            )
            for name, ran in self._ran.items()
        }


class _Watched:
    """See `Ran.watched`."""

    def __init__(self, name: str, session: Session, ran: Ran) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._name, self._session, self._ran = name, session, ran

    def serving(self, shapes: Mapping[str, Shape]) -> Session:
        return _Watched(self._name, serving(self._session, shapes), self._ran)

    def ran_on(self, shapes: Mapping[str, Shape]) -> RanOn:
        return self._session.ran_on(shapes) if isinstance(self._session, Choosing) else GRAPH

    def bind(self, input_shapes: Mapping[str, Shape]) -> Binding:
        binding = self._ran.lease.bind(self._session, input_shapes)
        self._ran.add(self._name, self.ran_on(input_shapes))
        return binding

    def close(self) -> None:
        self._session.close()
