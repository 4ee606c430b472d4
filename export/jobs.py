"""The components of a bundle: from which part of the sources each is made, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.manifest import SchedulerDefaults, TextConditioning
from .agreement import latent_space
from .autoencoders import decoder_graph, encoder_graph
from .checkpoint import Checkpoint, Part
from .conditioning import text_conditioning
from .controlnets import controlnet_graph
from .denoisers import denoiser_graph
from .graph import quiet
from .lazy import run
from .modules import Graph
from .samples import Samples, SampleText
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
    main = sources.main
    latent, text = latent_space(main.vae), text_conditioning(main)
    for name, part in sources.parts().items():
        if name in text.encoders:
            build = partial(text_encoder_graph, part, text.encoders[name])
        elif name == "vae_encoder":
            build = partial(encoder_graph, part)
        elif part is main.vae or name in sources.decoders:
            build = partial(decoder_graph, part, latent)
        elif name in sources.controlnets:
            build = partial(controlnet_graph, part, latent.downsampling)
        else:
            build = partial(denoiser_graph, part, controlled=sources.is_controlled(part))
        yield Job(name, part, build, sources.own_scheduler(name))


def samples(sources: Sources, bundle: Path, text: TextConditioning) -> Samples:
    """The inputs to compare components on, from the main checkpoint's own models and the tokenizers in `bundle`.

    Raises:
        CheckpointError: as `Job.graph`.
    """
    main = sources.main
    with quiet():
        picture = encoder_graph(main.vae)
    encode = partial(run, picture.module)
    size = max(sources.sample_size)
    return Samples(_sample_text(main, bundle, text), encode, latent_space(main.vae), main.scheduler, size)


def _sample_text(main: Checkpoint, bundle: Path, text: TextConditioning) -> SampleText:
    """The sample prompts through every text encoder, joined as the manifest says."""
    ids = {name: token_ids(bundle / encoder.tokenizer) for name, encoder in text.encoders.items()}
    beside, behind, pooled = [], [], []
    for name, encoder in text.encoders.items():
        with quiet():
            graph = text_encoder_graph(main.texts[name].encoder, encoder)
        given = run(graph.module, torch.from_numpy(ids[name]))
        tensors = [given] if isinstance(given, Tensor) else list(given)
        outputs = {spec.name: tensor.numpy() for spec, tensor in zip(graph.outputs, tensors, strict=True)}
        (beside if encoder.joins == "width" else behind).append(outputs[encoder.hidden_state])
        if encoder.pooled is not None:
            pooled.append(outputs[encoder.pooled])
    together = np.concatenate(beside, axis=2)
    padded = np.pad(together, ((0, 0), (0, 0), (0, text.width - together.shape[2])))
    zeros = np.zeros((len(padded), text.zero_tokens, text.width), np.float32)
    nothing = np.zeros((len(padded), 0), np.float32)
    return SampleText(ids, np.concatenate([padded, *behind, zeros], axis=1), np.concatenate([nothing, *pooled], axis=1))
