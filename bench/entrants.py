"""What a bundle and its peers are told to paint."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tandemrt.runtime.errors import BenchmarkError
from tandemrt.runtime.targets import ENGINES_ONLY, Target

from .contenders import Contender
from .peer_table import PEERS, Peer, interpreter, named_peer
from .room import Weights
from .rounds import Entrant
from .shared_arguments import BUNDLES

_FIRST_DECODER = "vae_decoder"
_OF_THE_CHECKPOINT = ("unet", "transformer")


@dataclass(frozen=True, slots=True)
class Work:
    """What is painted, the same by all.

    checkpoint: what the bundle was made of; added: its further denoisers, and its decoder where that is another one.
    arguments: of a request to TandemRT, besides prompt and seed; steps: what they come to, denoiser by denoiser.
    device: what peers run on, `cpu` or as PyTorch calls it. weights: of the models that a picture takes.
    """

    bundle: Path
    checkpoint: Path | None
    added: Mapping[str, Path]
    prompt: str
    arguments: Mapping[str, Any]
    steps: tuple[tuple[str, int], ...]
    guidance_scale: float
    height: int
    width: int
    decoder: str | None
    threads: int | None
    device: str
    cache: Path
    weights: Weights

    def resolved(self, request: Mapping[str, str]) -> dict[str, str]:
        """What was asked for, with what the bundle's own came to in its place."""
        came = {
            "size": f"{self.width}x{self.height}",
            "guidance scale": f"{self.guidance_scale:g}",
            "steps": ", ".join(f"{name} {count}" for name, count in self.steps),
        }
        return {key: came.get(key, value) if value == BUNDLES else value for key, value in request.items()}

    @property
    def shared(self) -> dict[str, Any]:
        """What every contender is told."""
        return {
            "bundle": str(self.bundle),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "added": {name: str(path) for name, path in self.added.items()},
            "prompt": self.prompt,
            "steps": list(self.steps),
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "pictures": self.arguments["num_images_per_prompt"],
            "decoder": str(self.added[self.decoder]) if self.decoder in self.added else None,
            "threads": self.threads,
        }


def every_entrant(work: Work, targets: Iterable[str], peers: Iterable[str]) -> dict[str, Entrant]:
    """TandemRT on each of the targets, then the peers."""
    own = {own_name(target): own_entrant(work, target) for target in targets}
    return {**own, **{name: peer_entrant(work, name) for name in peers}}


def own_entrant(work: Work, target: str) -> Entrant:
    """TandemRT on a target."""
    job = {**work.shared, "target": target, "cache": str(work.cache), "arguments": dict(work.arguments)}
    start = partial(Contender, own_name(target), sys.executable, "ours.py", job)
    return Entrant(start, memory_bytes=work.weights.held_on(target))


def own_name(target: str) -> str:
    """What TandemRT on a target is called in a report."""
    return f"tandemrt {target}"


def peer_device(target: Target) -> str:
    """What peers run on, to be measured beside a target."""
    of_nvidia = target.backend in ENGINES_ONLY or target.device in ("tensorrt", "tensorrt-rtx")
    return "cuda" if of_nvidia else target.device


def peer_entrant(work: Work, name: str) -> Entrant:
    """A peer; what keeps it from running is told when it is started.

    Raises, when it is called:
        BenchmarkError: it cannot do this work, or is not installed.
    """

    def start() -> Contender:
        peer = named_peer(name)
        _require_able(name, peer, work)
        job = {**work.shared, "device": work.device, "cache": str(work.cache), **peer.settings}
        return Contender(name, interpreter(name, work.cache), peer.script, job)

    half = PEERS[name].settings.get("dtype") == "bfloat16" or PEERS[name].settings.get("precision") == "bf16"
    # Other devices have memory of their own.
    return Entrant(start, memory_bytes=work.weights.held_bytes(half=half) if work.device == "cpu" else 0)


def _require_able(name: str, peer: Peer, work: Work) -> None:
    """Raise BenchmarkError where a peer cannot do this work, or lacks what it reads."""
    if work.device not in peer.devices:
        remedy = "Its times beside that would say nothing; name a target on the CPU first."
        raise BenchmarkError(name, f"runs on the CPU here, TandemRT on {work.device}", remedy=remedy)
    if not peer.hybrid and len(dict(work.steps)) > 1:
        raise BenchmarkError(name, "runs one denoiser in a picture, this plan has several")
    if not peer.hybrid and work.steps[0][0] not in _OF_THE_CHECKPOINT:
        raise BenchmarkError(name, f"paints with the pipeline's own denoiser, not with {work.steps[0][0]}")
    if not peer.hybrid and work.decoder not in (None, _FIRST_DECODER):
        raise BenchmarkError(name, f"paints with the bundle's first decoder, not with {work.decoder}")
    if peer.reads != "checkpoint":
        return
    if work.checkpoint is None:
        remedy = "Name the checkpoint that the bundle was made of with --checkpoint."
        raise BenchmarkError(name, "reads a checkpoint, and none was named", remedy=remedy)
    needed = [component for component, _ in work.steps if component not in _OF_THE_CHECKPOINT]
    if work.decoder not in (None, _FIRST_DECODER):
        needed.append(str(work.decoder))
    missing = [component for component in dict.fromkeys(needed) if component not in work.added]
    if missing:
        remedy = "Name it with --small, --tiny-vae or --add NAME=DIR."
        raise BenchmarkError(name, f"reads a checkpoint of {', '.join(missing)}, and none was named", remedy=remedy)
