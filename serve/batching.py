"""Requests that run as one: what they have in common, the one request of all, and each one's part of what it makes."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tandemrt.runtime import Handover, Output, Request, StepEvent
from tandemrt.runtime.edge import names_cloud
from tandemrt.runtime.request import EMBEDS, TEXTS

from .work import Work

_OF_A_PICTURE = frozenset({*TEXTS, *EMBEDS, "seed", "num_images_per_prompt", "start"})
# What a plan and the latents' shape say already.
_COMPILED = frozenset(
    {"steps", "num_inference_steps", "solver", "solver_config", "timesteps", "eta", "guidance_scale",
     "guidance_interval", "height", "width"}
)  # fmt: skip
_THE_SAME = ("seed_device", "decoder", "output_type", "previews", "strict_prompts", "until")
_DEFAULT = [one for one in fields(Request) if one.name not in _OF_A_PICTURE | _COMPILED | frozenset(_THE_SAME)]
Seed = int | tuple[int, ...]


def in_common(work: Work) -> Hashable | None:
    """What is the same of all requests that may run as one with this; None where none may."""
    request = work.request
    if names_cloud(request.steps):
        return None  # what one may send there, all together may not
    if any(getattr(request, one.name) is not one.default for one in _DEFAULT):
        return None
    if request.pictures > 1 and not isinstance(_given_seed(request), Sequence):
        return None  # one generator draws the noise of all its pictures
    texts = tuple(_text(request, name) is None for name in TEXTS)
    embeds = tuple(None if (one := getattr(request, name)) is None else one.shape[1:] for name in EMBEDS)
    start = None if request.start is None else (request.start.step, request.start.plan)
    same = tuple(getattr(request, name) for name in _THE_SAME)
    return work.plan.digest, work.plan.denoisers, work.shape[1:], texts, embeds, start, same


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that have all in common that they need to, as one.

    seeds: each one's own, drawn where it brings none. ends: the picture of all before which each one's end.
    """

    requests: tuple[Request, ...]
    seeds: tuple[Seed, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, works: Sequence[Work]) -> Batch:
        requests = tuple(work.request for work in works)
        ends = tuple(int(end) for end in np.cumsum([request.pictures for request in requests]))
        return cls(requests, tuple(map(_seed, requests)), ends)

    @property
    def request(self) -> Request:
        """What makes the pictures of all, in their order; one alone is itself."""
        if len(self.requests) == 1:
            return self.requests[0]
        first = self.requests[0]
        pairs = zip(self.requests, self.seeds, strict=True)
        seeds = tuple(seed for request, own in pairs for seed in (own if isinstance(own, tuple) else (own,)))
        given: dict[str, Any] = {name: self._texts(name) for name in TEXTS}
        given |= {name: self._embeds(name) for name in EMBEDS}
        if first.start is not None:
            state = np.concatenate([one.start.state for one in self.requests if one.start is not None], axis=1)
            given["start"], seeds_given = replace(first.start, state=state, seed=seeds), None
        else:
            seeds_given = seeds
        return replace(first, **given, seed=seeds_given, num_images_per_prompt=1)

    def outputs(self, output: Output) -> list[Output]:
        """What each one is given of what the request of all made; of one alone that is all."""
        if len(self.requests) == 1:
            return [output]
        return [self._output(output, index) for index in range(len(self.requests))]

    def event(self, event: StepEvent, index: int) -> StepEvent:
        """What one is told of a row, which has his pictures alone."""
        return replace(event, preview=event.preview[self._own(index)]) if event.preview else event

    def _output(self, output: Output, index: int) -> Output:
        own, handover = self._own(index), output.handover
        texts = {text for name in TEXTS for text in _listed(self.requests[index], name) or ()}
        if handover is not None:
            handover = _part(handover, own, self.seeds[index])
        return replace(
            output,
            images=output.images[own],
            latents=output.latents[own].copy(),
            seeds=output.seeds[own],
            dropped_text=tuple(dropped for dropped in output.dropped_text if dropped.prompt in texts),
            handover=handover,
        )

    def _own(self, index: int) -> slice:
        return slice(self.ends[index - 1] if index else 0, self.ends[index])

    def _texts(self, name: str) -> list[str] | None:
        listed = [_listed(request, name) for request in self.requests]
        return None if listed[0] is None else [text for texts in listed for text in texts or ()]

    def _embeds(self, name: str) -> Any:
        given = [(request, getattr(request, name)) for request in self.requests]
        if given[0][1] is None:
            return None
        rows = [np.broadcast_to(array, (request.batch, *array.shape[1:])) for request, array in given]
        counts = [request.num_images_per_prompt for request in self.requests]
        return np.concatenate([array.repeat(count, axis=0) for array, count in zip(rows, counts, strict=True)])


def _part(handover: Handover, own: slice, seed: Seed) -> Handover:
    return replace(handover, state=handover.state[:, own].copy(), seed=seed)


def _text(request: Request, name: str) -> Any:
    """A request's text of that name; an empty second or third one stands for the first, and is none."""
    given = getattr(request, name)
    return given if name in ("prompt", "negative_prompt") else given or None


def _listed(request: Request, name: str) -> list[str] | None:
    """A request's texts of that name, one for each picture."""
    given = _text(request, name)
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else list(given)
    return [text for text in texts * (request.batch // len(texts)) for _ in range(request.num_images_per_prompt)]


def _given_seed(request: Request) -> int | Sequence[int] | None:
    return request.seed if request.start is None else request.start.seed


def _seed(request: Request) -> Seed:
    given = _given_seed(request)
    if given is None:
        return secrets.randbits(32)
    return tuple(given) if isinstance(given, Sequence) else given
