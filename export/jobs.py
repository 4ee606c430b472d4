"""The components of a bundle: from which part of the sources each is made, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..runtime.errors import CheckpointError
from ..runtime.manifest import SchedulerDefaults, TextConditioning
from .adopt import AdoptedGraph, adopt_decoder, adopt_encoder, adopt_text_encoder, adopt_unet
from .agreement import latent_space
from .autoencoders import decoder_graph, encoder_graph
from .checkpoint import Part
from .conditioning import text_conditioning
from .controlnets import controlnet_graph
from .denoisers import denoiser_graph
from .foreign_graph import is_foreign
from .graph import quiet
from .lazy import run
from .modules import Graph
from .plan import ExportPlan
from .samples import Samples, SampleText
from .sources import Sources, read_sources
from .text_encoders import text_encoder_graph
from .tokenizer import token_ids


@dataclass(frozen=True)
class Job:
    """One component to make: the part it comes from and how its graph is built.

    scheduler: the denoiser's own, where it differs from the bundle's.
    """

    name: str
    part: Part
    build: Callable[[], Graph | AdoptedGraph]
    scheduler: SchedulerDefaults | None = None

    def graph(self) -> Graph | AdoptedGraph:
        """Build the graph around the weights, or adapt the one in their place.

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
        found = is_foreign(part.weights)
        build: Callable[[], Graph | AdoptedGraph]
        if name in text.encoders:
            build = partial(adopt_text_encoder if found else text_encoder_graph, part, text.encoders[name])
        elif name == "vae_encoder":
            build = partial(adopt_encoder if found else encoder_graph, part)
        elif part is main.vae or name in sources.decoders:
            build = partial(adopt_decoder if found else decoder_graph, part, latent)
        elif name in sources.controlnets:
            build = partial(controlnet_graph, part, latent.downsampling)
        elif found:
            build = partial(adopt_unet, part)
        else:
            build = partial(denoiser_graph, part, controlled=sources.is_controlled(part))
        yield Job(name, part, build, sources.own_scheduler(name))


def references(plan: ExportPlan) -> dict[str, Job]:
    """The components of the checkpoint that a plan's graphs are compared with; none where it names no checkpoint.

    Raises:
        CheckpointError: it is none of a supported kind, or holds graphs itself.
    """
    if plan.verify_against is None:
        return {}
    found = {job.name: job for job in jobs(read_sources(ExportPlan(plan.verify_against, plan.out)))}
    for job in found.values():
        require_weights(job)
    return found


def reference_of(name: str, graph: AdoptedGraph, found: Mapping[str, Job]) -> Graph:
    """What to compare the graph of component `name` with.

    Raises:
        CheckpointError: the checkpoint has no such component, or one with other tensors.
    """
    reference = found[name].graph() if name in found else None
    if not isinstance(reference, Graph) or (reference.inputs, reference.outputs) != (graph.inputs, graph.outputs):
        raise CheckpointError(
            f"--verify-against: {name}",
            "not what the graph was exported from; its inputs and outputs",
            got=None if reference is None else _described(reference),
            expected=_described(graph),
            remedy="Give the checkpoint that the graphs were exported from.",
        )
    return reference


def require_weights(job: Job) -> None:
    """Check that a component's source is weights, which PyTorch can run.

    Raises:
        CheckpointError: it is an ONNX graph.
    """
    if is_foreign(job.part.weights):
        what = "an ONNX graph, which there is nothing in PyTorch to compare with"
        raise CheckpointError(f"{job.name}: {job.part.folder}", what, remedy="Give the checkpoint that it came from.")


def _described(graph: Graph | AdoptedGraph) -> str:
    return ", ".join(f"{spec.name} ({', '.join(map(str, spec.shape))})" for spec in (*graph.inputs, *graph.outputs))


def samples(sources: Sources, bundle: Path, text: TextConditioning) -> Samples:
    """The inputs to compare components on, from the main checkpoint's own models and the tokenizers in `bundle`.

    Raises:
        CheckpointError: as `Job.graph`.
        ExportError: a graph in the place of weights does not run.
    """
    main, wanted = sources.main, {job.name: job for job in jobs(sources)}
    picture = wanted["vae_encoder"].graph()

    def encode(pictures: Tensor) -> Tensor:
        return torch.from_numpy(_outputs(picture, pictures.numpy())[picture.outputs[0].name])

    size = max(sources.sample_size)
    return Samples(_sample_text(wanted, bundle, text), encode, latent_space(main.vae), main.scheduler, size)


def _sample_text(encoders: Mapping[str, Job], bundle: Path, text: TextConditioning) -> SampleText:
    """The sample prompts through every text encoder, joined as the manifest says."""
    ids = {name: token_ids(bundle / encoder.tokenizer) for name, encoder in text.encoders.items()}
    beside, behind, pooled = [], [], []
    for name, encoder in text.encoders.items():
        outputs = _outputs(encoders[name].graph(), ids[name])
        (beside if encoder.joins == "width" else behind).append(outputs[encoder.hidden_state])
        if encoder.pooled is not None:
            pooled.append(outputs[encoder.pooled])
    together = np.concatenate(beside, axis=2)
    padded = np.pad(together, ((0, 0), (0, 0), (0, text.width - together.shape[2])))
    zeros = np.zeros((len(padded), text.zero_tokens, text.width), np.float32)
    nothing = np.zeros((len(padded), 0), np.float32)
    return SampleText(ids, np.concatenate([padded, *behind, zeros], axis=1), np.concatenate([nothing, *pooled], axis=1))


def _outputs(graph: Graph | AdoptedGraph, given: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """What a graph of one input makes, by name."""
    if isinstance(graph, AdoptedGraph):
        return graph.run(given)
    result = run(graph.module, torch.from_numpy(given))
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return {spec.name: tensor.numpy() for spec, tensor in zip(graph.outputs, tensors, strict=True)}
