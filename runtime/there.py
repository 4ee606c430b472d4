"""A server's denoisers beside those that are here."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import msgspec

from .bounded_socket import Bounds
from .cloud import Cloud
from .errors import CloudError
from .handover import models_of
from .manifest import Component, Manifest
from .plan import CLOUD
from .plan_steps import Steps

# How long opening a pipeline, and each later look, waits for a server that does not say what it serves.
OPENING_S = 3.0


def with_cloud(manifest: Manifest, components: Mapping[str, Component]) -> Manifest:
    """A manifest in which the server's denoisers are components too, under their names with `cloud:` before them."""
    added = {f"{CLOUD}{name}": component for name, component in components.items()}
    return msgspec.structs.replace(manifest, components={**manifest.components, **added})


class There:
    """A server's denoisers beside those that are here; safe to share between threads.

    manifest: with the server's, as it said once; with those that are here in their place until it has. models: what the
    two sides compare, see `models_of`: of a denoiser the one that is here under the name, else the one that it said.
    said: whether it has. offered: of the server's denoisers those that it is known to have, and as they are here, where
    they are; with `cloud:` before them.
    """

    def __init__(self, cloud: Cloud, manifest: Manifest) -> None:
        """Look what the server has; where it does not say, `ask` and `look` do so again."""
        own = {name: manifest.components[name] for name in manifest.names("denoiser")}
        self.cloud, self.manifest, self._own = cloud, with_cloud(manifest, own), tuple(own)
        self.models: Mapping[str, str] = models_of(manifest)
        self.offered: tuple[str, ...] = ()
        self.said, self._lock, self._closed = False, threading.Lock(), threading.Event()
        with suppress(CloudError):
            self.look()

    def close(self) -> None:
        """End all waits within `bounds`, for good, and hang up on the server."""
        self._closed.set()
        self.cloud.close()

    def bounds(self, cancelled: threading.Event | None = None, spent_s: float = 0.0) -> Bounds:
        """As of the cloud; closing this ends them too."""
        return replace(self.cloud.bounds(cancelled, spent_s), closed=self._closed)

    def ask(self, bounds: Bounds) -> None:
        """Have the server say what it serves, unless it has; one caller asks, and others wait within their bounds.

        Raises:
            CloudError: it does not, or not in time.
            CancelledError: it was cancelled.
        """
        with self._turn(bounds):
            if not self.said:
                self.cloud.retried(lambda: self._learn(bounds), bounds)

    def look(self, cancelled: threading.Event | None = None) -> None:
        """As `ask`, once, within OPENING_S: a failure is not counted, a server that is left alone is asked too.

        One that says what it serves is not left alone any more.
        """
        bounds = self.bounds(cancelled, max(0.0, self.cloud.seconds - OPENING_S))
        with self._turn(bounds):
            if not self.said:
                self._learn(bounds)
                self.cloud.whole()

    def known(self, steps: Steps | None) -> Steps | None:
        """Steps in which one of the denoisers that are here stands for those that the server may yet tell of.

        It is the first that is named. What the steps come to is checked with it; a pipeline asks the server once more,
        and runs all of them here if it must.
        """
        if self.said or steps is None or isinstance(steps, int):
            return steps
        pairs, have = list(steps.items() if isinstance(steps, Mapping) else steps), self.manifest.components
        if all(name in have or not name.startswith(CLOUD) for name, _ in pairs):
            return steps
        instead = next((name for name, _ in pairs if name in self._own), self._own[-1])
        return [(instead if name.startswith(CLOUD) and name not in have else name, count) for name, count in pairs]

    @contextmanager
    def _turn(self, bounds: Bounds) -> Iterator[None]:
        try:
            while not self._lock.acquire(timeout=bounds.look_s()):
                pass
        except TimeoutError as error:
            raise self.cloud.ended(bounds) from error
        try:
            yield
        finally:
            self._lock.release()

    def _learn(self, bounds: Bounds) -> None:
        described = self.cloud.described(bounds)
        # In this order: who sees a denoiser in the manifest finds its model.
        self.models = {**described.models, **self.models}
        self.manifest = with_cloud(self.manifest, described.components)
        same = [name for name in described.components if self.models[name] == described.models[name]]
        self.offered = tuple(f"{CLOUD}{name}" for name in same)
        self.said = True
