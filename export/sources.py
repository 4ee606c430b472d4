"""Everything an export reads, found and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.manifest import SchedulerDefaults
from .agreement import (
    latent_space,
    prediction_type,
    require_decoder,
    require_denoiser,
    require_main,
    sample_size,
    spatial_multiple,
    text_width,
)
from .checkpoint import Checkpoint, DenoiserSource, Part, read_checkpoint, read_decoder, read_denoiser
from .plan import Added, ExportPlan
from .publish import require_free
from .weights import parameters, source_digest


@dataclass(frozen=True)
class Sources:
    """A checkpoint and the further denoisers and decoders that go into its bundle, by name."""

    main: Checkpoint
    denoisers: Mapping[str, DenoiserSource]
    decoders: Mapping[str, Part]

    @property
    def text_width(self) -> int:
        """How wide the text encoder's hidden states are."""
        return text_width(self.main)

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the latents the main denoiser was made for."""
        return sample_size(self.main.unet)

    def parts(self) -> dict[str, Part]:
        """The part that every component of the bundle is made from, in the manifest's order."""
        return {
            "text_encoder": self.main.text_encoder,
            "unet": self.main.unet,
            **{name: source.unet for name, source in self.denoisers.items()},
            "vae_decoder": self.main.vae,
            **self.decoders,
            "vae_encoder": self.main.vae,
        }

    def own_scheduler(self, name: str) -> SchedulerDefaults | None:
        """A component's scheduler where it brings one that differs from the bundle's."""
        scheduler = self.denoisers[name].scheduler if name in self.denoisers else None
        return scheduler if scheduler != self.main.scheduler else None

    def digest(self, part: Part) -> str:
        """The sha256 over a part's configuration and weights."""
        return source_digest(part.files)


def read_sources(checkpoint: Path, added: Sequence[Added], *, allow_pickle: bool = False) -> Sources:
    """Find every model of a bundle and check that they fit together; weights themselves are not read yet.

    Raises:
        CheckpointError: a folder is no checkpoint of a supported kind, or models disagree.
    """
    main = read_checkpoint(checkpoint, allow_pickle=allow_pickle)
    require_main(main)
    sources = Sources(
        main,
        {each.name: read_denoiser(each.folder, allow_pickle=allow_pickle) for each in added if each.role == "denoiser"},
        {
            each.name: read_decoder(each.folder, allow_pickle=allow_pickle)
            for each in added
            if each.role == "vae_decoder"
        },
    )
    for name, denoiser in sources.denoisers.items():
        require_denoiser(name, denoiser, main)
    for name, decoder in sources.decoders.items():
        require_decoder(name, decoder, main)
    return sources


def describe(plan: ExportPlan) -> dict[str, Any]:
    """What an export would do, in JSON's types: the plan, the models found, and what they share.

    Raises:
        CheckpointError: as `read_sources`.
        ExportError: `plan.out` exists and may not be replaced.
    """
    require_free(plan.out, force=plan.force)
    sources = read_sources(plan.checkpoint, plan.added, allow_pickle=plan.allow_pickle)
    main, latent = sources.main, latent_space(sources.main.vae)
    return {
        **plan.as_json(),
        "components": {
            name: {
                "class_name": part.class_name,
                "folder": str(part.folder),
                "parameters_in_file": parameters(part.weights),
            }
            for name, part in sources.parts().items()
        },
        "latent": {
            "channels": latent.channels,
            "downsampling": latent.downsampling,
            "scaling_factor": latent.scaling_factor,
            "shift_factor": latent.shift_factor,
        },
        "prediction_type": prediction_type(main.scheduler),
        "scheduler": main.scheduler.class_name,
        "spatial_multiple": max(
            spatial_multiple(part) for part in (main.unet, *(s.unet for s in sources.denoisers.values()))
        ),
    }
