"""What is served: a bundle under a name, on a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.targets import Target

from .problems import conflict, unknown_model


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle that is served.

    digest: its own. platform: the target that it runs on. models: `Manifest.model_digest` by denoiser of the bundle's.
    manifest: `Pipeline.manifest`, where a cloud's denoisers are too.
    """

    name: str
    digest: str
    platform: str
    manifest: Manifest
    models: Mapping[str, str]

    @classmethod
    def of(cls, pipe: Pipeline) -> Served:
        """A pipeline's bundle, named as its folder."""
        return cls.on(pipe.bundle, pipe.target, pipe.manifest)

    @classmethod
    def on(cls, bundle: Bundle, target: Target, manifest: Manifest | None = None) -> Served:
        """A bundle on a target, named as its folder; manifest: see above, the bundle's own by default."""
        own = bundle.manifest
        models = {name: own.model_digest(name) for name in own.names("denoiser")}
        return cls(bundle.path.name, bundle.digest, target.told(own), manifest or own, models)

    def require(self, name: str | None) -> None:
        """Raise Problem where a model of another name is wanted; None is any."""
        if name not in (None, self.name):
            raise unknown_model(str(name), self.name)

    def require_models(self, models: Mapping[str, str]) -> None:
        """Raise Problem where a caller expects another model than the one of the same name that is served."""
        for name, digest in models.items():
            if self.models.get(name, digest) != digest:
                own = self.models[name][:16]
                raise conflict(f"models: {name}: got {digest[:16]!r}, expected {own!r}, which is served.")

    @property
    def facts(self) -> dict[str, Any]:
        """What the bundle is, as the Open Inference Protocol tells of a model.

        denoisers: what `steps` may name, a cloud's with `cloud:` before them; components: those of the bundle itself.
        """
        manifest = self.manifest
        return {
            "name": self.name,
            "platform": self.platform,
            "bundle": self.digest,
            "models": dict(self.models),
            "denoisers": manifest.names("denoiser"),
            "components": {name: msgspec.to_builtins(manifest.components[name]) for name in self.models},
            "latent": {"channels": manifest.latent.channels, "downsampling": manifest.latent.downsampling},
            "defaults": msgspec.to_builtins(manifest.defaults),
        }
