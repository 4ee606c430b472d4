"""A server's denoisers beside those that are here."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from .bounded_socket import Bounds
from .cloud import Cloud, Described
from .errors import CloudError
from .handover import models_of
from .manifest import Component, Manifest
from .plan import CLOUD

# How long opening a pipeline waits for a server that does not say what it serves; it is asked again later.
OPENING_S = 3.0


def with_cloud(manifest: Manifest, components: Mapping[str, Component]) -> Manifest:
    """A manifest in which the server's denoisers are components too, under their names with `cloud:` before them."""
    added = {f"{CLOUD}{name}": component for name, component in components.items()}
    return msgspec.structs.replace(manifest, components={**manifest.components, **added})


class There:
    """A server's denoisers beside those that are here; safe to share between threads.

    manifest: with the server's, as it said once; with those that are here in their place until it has. models: which
    model each one is to be, see `models_of`: the one that is here under the name, else the one that it said.
    said: whether it has.
    """

    def __init__(self, cloud: Cloud, manifest: Manifest) -> None:
        """Ask the server; one that cannot be asked is asked again by `ask`, and thought no worse of."""
        own = {name: manifest.components[name] for name in manifest.names("denoiser")}
        self.cloud, self.manifest = cloud, with_cloud(manifest, own)
        self.models: Mapping[str, str] = models_of(manifest)
        self.said, self._lock = False, threading.Lock()
        with suppress(CloudError):
            spent_s = max(0.0, cloud.seconds - OPENING_S)
            self._learn(cloud.described(cloud.bounds(spent_s=spent_s)))

    def ask(self, bounds: Bounds) -> None:
        """Have the server say what it serves, unless it has; one caller asks, and others wait within their bounds.

        Raises:
            CloudError: it does not, or not in time.
            CancelledError: it was cancelled.
        """
        if not self.said:
            self.cloud.retried(lambda: self._ask(bounds), bounds)

    def _ask(self, bounds: Bounds) -> None:
        try:
            while not self._lock.acquire(timeout=bounds.look_s()):
                pass
        except TimeoutError as error:
            raise self.cloud.ended(bounds) from error
        try:
            if not self.said:
                self._learn(self.cloud.described(bounds))
        finally:
            self._lock.release()

    def _learn(self, described: Described) -> None:
        # In this order: who sees a denoiser in the manifest finds its model.
        self.models = {**described.models, **self.models}
        self.manifest = with_cloud(self.manifest, described.components)
        self.said = True
