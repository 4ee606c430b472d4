"""The components of a bundle: from which part of the sources each is made, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..runtime.manifest import SchedulerDefaults
from .agreement import latent_space
from .autoencoders import decoder_graph, encoder_graph
from .checkpoint import Part
from .denoisers import denoiser_graph
from .graph import quiet
from .modules import Graph
from .samples import Samples
from .sources import Sources
from .text_encoders import text_encoder_graph
from .tokenizer import token_ids


@dataclass(frozen=True)
class Job:
    """One component to make: the part it comes from and how its graph is built.

    scheduler: the denoiser's own, where it differs from the bundle's.
    """

    name: str
    part: Part
    build: Callable[[], Graph]
    scheduler: SchedulerDefaults | None = None

    def graph(self) -> Graph:
        """Read the weights and build the graph.

        Raises:
            CheckpointError: the weights are damaged or do not fit the configuration.
        """
        with quiet():
            return self.build()


def jobs(sources: Sources) -> Iterator[Job]:
    """Every component of the bundle that `sources` make, in the manifest's order."""
    latent, width = latent_space(sources.main.vae), sources.text_width
    for name, part in sources.parts().items():
        if name == "text_encoder":
            build = partial(text_encoder_graph, part)
        elif name == "vae_encoder":
            build = partial(encoder_graph, part)
        elif part is sources.main.vae or name in sources.decoders:
            build = partial(decoder_graph, part, latent)
        else:
            build = partial(denoiser_graph, part, width)
        yield Job(name, part, build, sources.own_scheduler(name))


def samples(sources: Sources, tokenizer: Path) -> Samples:
    """The inputs to compare components on, from the main checkpoint's own models and an exported tokenizer's folder.

    Raises:
        CheckpointError: as `Job.graph`.
    """
    main = sources.main
    with quiet():
        text, picture = text_encoder_graph(main.text_encoder), encoder_graph(main.vae)
    return Samples(
        token_ids(tokenizer),
        text.module,
        picture.module,
        latent_space(main.vae),
        main.scheduler,
        max(sources.sample_size),
    )
