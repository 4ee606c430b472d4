"""What is served: a bundle under a name, on a target, and what a cloud adds to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import CancelledError, CloudError
from tandemrt.runtime.handover import models_of
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.plan_steps import Steps
from tandemrt.runtime.targets import Target
from tandemrt.runtime.there import There

from .help import Help
from .problems import conflict, unknown_model
from .protocol import TENSORS

# How long a cloud that does not say what it serves is left alone, in seconds.
_ASKS_S = 5.0


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle that is served.

    digest: its own. platform: the target that it runs on. models: `models_of` the bundle.
    own: its manifest. there: a cloud's denoisers beside them, where there is a cloud. help: whether that helps.
    """

    name: str
    digest: str
    platform: str
    own: Manifest
    models: Mapping[str, str]
    there: There | None = None
    help: Help = field(default_factory=Help)

    @classmethod
    def of(cls, pipe: Pipeline) -> Served:
        """A pipeline's bundle, named as its folder."""
        return cls.on(pipe.bundle, pipe.target, pipe.there)

    @classmethod
    def on(cls, bundle: Bundle, target: Target, there: There | None = None) -> Served:
        """A bundle on a target, named as its folder; there: see above."""
        own = bundle.manifest
        return cls(name_of(bundle.path), bundle.digest, target.told(own), own, models_of(own), there)

    @property
    def manifest(self) -> Manifest:
        """With the cloud's denoisers, as far as it has told of them by now."""
        return self.own if self.there is None else self.there.manifest

    async def keep_asking(self) -> None:
        """Ask a cloud that has not said what it serves, until it has, or this is cancelled."""
        cancelled = threading.Event()
        try:
            while self.there is not None and not self.there.said:
                await self._ask(self.there, cancelled)
                await asyncio.sleep(_ASKS_S)
        finally:
            cancelled.set()

    async def _ask(self, there: There, cancelled: threading.Event) -> None:
        try:
            await asyncio.to_thread(there.look, cancelled)
        except CloudError as error:
            self.help.lost(f"{error.reason}: {error}")
        except CancelledError:
            pass
        else:
            self.help.back()

    def known(self, steps: Steps | None) -> Steps | None:
        """As `There.known`; without a cloud the steps themselves."""
        return steps if self.there is None else self.there.known(steps)

    def require(self, name: str | None) -> None:
        """Raise Problem where a model of another name is wanted; None is any."""
        if name not in (None, self.name):
            raise unknown_model(str(name), self.name)

    def require_models(self, models: Mapping[str, str]) -> None:
        """Raise Problem where a caller expects another model than the one of the name that is served, or none is."""
        for name, digest in models.items():
            own = self.models.get(name)
            if own is None:
                raise conflict(f"models: {name[:100]!r}: none is served, expected one of {', '.join(self.models)}.")
            if own != digest:
                raise conflict(f"models: {name}: got {digest[:16]!r}, expected {own[:16]!r}, which is served.")

    @property
    def facts(self) -> dict[str, Any]:
        """What the bundle is, as the Open Inference Protocol tells of a model.

        inputs, outputs: the tensors of `/v1/handoff`. denoisers: what `steps` may name, a cloud's with `cloud:` before
        them, once it is known to have them, and not others under their names; components: the bundle's own of them.
        """
        manifest, state = self.manifest, {"state": [-1, -1, self.own.latent.channels, -1, -1]}
        denoisers, offered = self.own.names("denoiser"), () if self.there is None else self.there.offered
        inputs = {**{name: [-1] * axes for name, axes in TENSORS.items()}, **state}
        return {
            "name": self.name,
            "versions": [self.digest],
            "platform": self.platform,
            "inputs": [{"name": name, "datatype": "FP32", "shape": shape} for name, shape in inputs.items()],
            "outputs": [{"name": name, "datatype": "FP32", "shape": shape} for name, shape in state.items()],
            "bundle": self.digest,
            "models": dict(self.models),
            "denoisers": [*denoisers, *offered],
            "components": {name: msgspec.to_builtins(self.own.components[name]) for name in denoisers},
            "latent": {"channels": manifest.latent.channels, "downsampling": manifest.latent.downsampling},
            "defaults": msgspec.to_builtins(manifest.defaults),
        }


def name_of(bundle: Path) -> str:
    """A bundle's name: that of its folder, also where it is given as `.` or `..`."""
    return (bundle.resolve() if bundle.name in ("", "..") else bundle).name
