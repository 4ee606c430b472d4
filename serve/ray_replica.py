"""A part of the work on one machine of several: an ordinary pipeline that is asked for its part alone.

Needs no Ray: what calls it elsewhere is in `ray_calls`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tandemrt.runtime import BundleError, CancelledError, ExecutionError, Handover, Output, Pipeline, Request, StepEvent
from tandemrt.runtime.backends.base import Array
from tandemrt.runtime.bounded_socket import Bounds
from tandemrt.runtime.conditioning import dropped_text
from tandemrt.runtime.elsewhere import Elsewhere
from tandemrt.runtime.errors import ArgumentError, TandemError
from tandemrt.runtime.plan import compile_plan
from tandemrt.runtime.tokenizer import DroppedText

from .limits import HANGS_S
from .problems import Problem

T = TypeVar("T")
Float32 = npt.NDArray[np.float32]
TEXT, DECODER = "text", "decoder"


class LostError(TandemError):
    """A replica that was asked is gone, or its machine; another one may do the same again."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a replica opens: the bundle's path on every machine, and its digest, so that it is the same on all."""

    bundle: str
    digest: str
    target: str = "auto"
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a request's texts come to: the arguments of a call that stand for them, and what was cut from them."""

    embeds: Mapping[str, Float32]
    dropped: tuple[DroppedText, ...]


# Runs a component on another replica, by its name and inputs, for a request within its bounds; see `Elsewhere`.
Remote = Callable[[str, Mapping[str, Array], Bounds], Mapping[str, Array]]
_IDLE = Bounds(float("inf"), threading.Event())


class Replica:
    """One at a time it encodes texts, runs steps of a denoiser, or decodes: whatever it is asked, of its own models.

    part: what it is for, a denoiser's name, `text` or `decoder`, which it has run when it is made.
    branch: what runs the branch of guidance without the prompt, within what is left of the request that is run; both
        are run here otherwise.

    Raises:
        BundleError: the bundle here is another one.
        TandemError: as `Pipeline.open`, and as its first run.
    """

    def __init__(self, place: Place, part: str, threads: int | None = None, branch: Remote | None = None) -> None:
        elsewhere = None if branch is None else self._bounded(branch)
        self._pipe = Pipeline.open(place.bundle, place.target, threads=threads, cache=place.cache, elsewhere=elsewhere)
        if (got := self._pipe.bundle.digest) != place.digest:
            remedy = "Put the same bundle on every machine."
            raise BundleError(place.bundle, "another bundle", got=got[:16], expected=place.digest[:16], remedy=remedy)
        self._part, self._apart = part, branch is not None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandemrt-replica")
        self._bounds, self._failed = _IDLE, False
        self._warm_up()

    def close(self) -> None:
        """Free the models, when what runs has ended."""
        self._thread.shutdown(cancel_futures=True)
        self._pipe.close()

    async def encode(self, request: Request, seconds: float) -> Encoded:
        """See `Pipeline.encode_prompt`; within so many seconds, of which waiting here is a part."""

        def encoded() -> Encoded:
            embeds = self._pipe.encode_prompt(**request.arguments)
            guided = "negative_prompt_embeds" in embeds
            return Encoded(embeds, dropped_text(self._pipe.bundle, request, guided=guided))

        return await self._in_turn(encoded, seconds)

    async def run_component(self, name: str, inputs: Mapping[str, Array], seconds: float) -> dict[str, Array]:
        """See `Pipeline.run_component`; seconds: as of `encode`."""
        return await self._in_turn(lambda: self._pipe.run_component(name, inputs), seconds)

    async def paint(self, request: Request, seconds: float) -> AsyncIterator[StepEvent | Output]:
        """The events of a request's rows, and what it makes; seconds: as of `encode`.

        It ends after the call of the model that is running when nobody iterates any more, or the time is over.

        Raises:
            CancelledError: it took longer.
            TandemError: as a call of the pipeline.
        """
        loop, bounds = asyncio.get_running_loop(), bounds_within(seconds)
        told: asyncio.Queue[StepEvent | None] = asyncio.Queue()
        stream = await asyncio.to_thread(self._pipe.stream, **request.arguments)

        def walk() -> Output:
            for event in stream:
                loop.call_soon_threadsafe(told.put_nowait, event)
            return stream.result()

        working = loop.run_in_executor(self._thread, self._watched, walk, bounds)
        working.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (event := await self._before(told.get(), bounds)) is not None:
                yield event
            yield working.result()
        finally:
            bounds.cancelled.set()
            stream.cancel()
            await asyncio.wait([working])
            if not working.cancelled():
                working.exception()  # where nobody iterates any more it is nobody's

    async def check_health(self) -> None:
        """Raise where the models do not answer; after a failure they are tried, unless others' work runs.

        Raises:
            ExecutionError: a call of a model does not end.
            TandemError: as the call of the models that was tried.
        """
        late = time.monotonic() - self._bounds.ends
        if late > HANGS_S:
            raise ExecutionError(self._part, f"a call of a model should have ended {late:.0f} s ago")
        if self._failed and self._bounds is _IDLE:  # what runs now tells by itself
            await asyncio.get_running_loop().run_in_executor(self._thread, self._warm_up)
            self._failed = False

    async def _in_turn(self, work: Callable[[], T], seconds: float) -> T:
        bounds = bounds_within(seconds)
        working = asyncio.get_running_loop().run_in_executor(self._thread, self._watched, work, bounds)
        made: T = await self._before(working, bounds)
        return made

    async def _before(self, awaited: Any, bounds: Bounds) -> Any:
        """What is awaited, within its bounds."""
        try:
            return await asyncio.wait_for(awaited, bounds.left_s)
        except (asyncio.TimeoutError, TimeoutError) as late:
            raise CancelledError(self._part, "took longer than it may") from late

    def _watched(self, work: Callable[[], T], bounds: Bounds) -> T:
        """Do what is this thread's next, unless its time is over.

        What fails is noted, where it is not the caller's fault or another replica's.
        """
        if bounds.over:
            raise CancelledError(self._part, "waited for longer than it may take")
        self._bounds = bounds
        try:
            made = work()
        except (ArgumentError, CancelledError, LostError, Problem):
            raise
        except Exception:
            self._failed = True
            raise
        finally:
            self._bounds = _IDLE
        self._failed = False
        return made

    def _bounded(self, branch: Remote) -> Elsewhere:
        """A branch elsewhere, within the bounds of the request that is run here when it is called."""
        return lambda name, inputs: branch(name, inputs, self._bounds)

    def _warm_up(self) -> None:
        """Load and run what this replica is for."""
        if self._part == TEXT:
            self._pipe.encode_prompt(prompt=str(time.monotonic_ns()))  # one that is not kept yet
            return
        text = self._pipe.bundle.manifest.text
        embeds: dict[str, Any] = {"prompt_embeds": np.zeros((1, text.max_length, text.width), np.float32)}
        if text.pooled_width:
            embeds["pooled_prompt_embeds"] = np.zeros((1, text.pooled_width), np.float32)
        both = {**embeds, **{f"negative_{name}": values for name, values in embeds.items()}}
        if self._part != DECODER:
            # Where the other branch is elsewhere, that one need not be there yet.
            guidance: dict[str, Any] = {"guidance_scale": 1.0} if self._apart else {}
            self._pipe(**both, **guidance, steps={self._part: 1}, until=1, seed=0)
            return
        request = Request(**both, steps=1, seed=0)
        manifest = self._pipe.bundle.manifest
        plan = compile_plan(manifest, request.schedule)
        shape = (1 + plan.table.history, *request.latent_shape(manifest, plan.denoisers))
        start = Handover(np.zeros(shape, np.float32), 1, plan.digest, self._pipe.bundle.digest, 0)
        self._pipe(**both, steps=1, start=start, output_type="np")


def bounds_within(seconds: float) -> Bounds:
    """Those of a request that may take so long from now on."""
    return Bounds(time.monotonic() + seconds, threading.Event())
