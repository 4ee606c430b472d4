"""What is served: a bundle under a name, on a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from tandemrt.runtime import Pipeline
from tandemrt.runtime.manifest import Manifest

from .problems import unknown_model


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle that is served; digest: its own. platform: the target that it runs on."""

    name: str
    digest: str
    platform: str
    manifest: Manifest

    @classmethod
    def of(cls, pipe: Pipeline) -> Served:
        """A pipeline's bundle, named as its folder."""
        bundle = pipe.bundle
        return cls(bundle.path.name, bundle.digest, pipe.target.told(bundle.manifest), bundle.manifest)

    def require(self, name: str | None) -> None:
        """Raise Problem where a model of another name is wanted; None is any."""
        if name not in (None, self.name):
            raise unknown_model(str(name), self.name)

    @property
    def facts(self) -> dict[str, Any]:
        """What the bundle is, as the Open Inference Protocol tells of a model."""
        manifest = self.manifest
        return {
            "name": self.name,
            "platform": self.platform,
            "bundle": self.digest,
            "components": {name: msgspec.to_builtins(manifest.components[name]) for name in manifest.names("denoiser")},
            "latent": {"channels": manifest.latent.channels, "downsampling": manifest.latent.downsampling},
            "defaults": msgspec.to_builtins(manifest.defaults),
        }
