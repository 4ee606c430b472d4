"""The arguments of `tandemrt generate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import thread_count
from ..cloud import Cloud
from ..errors import ArgumentError, RequestError
from ..plan import CLOUD
from ..request_checks import require_pictures
from .cloud_options import add_cloud, cloud_from
from .generate_options import FURTHER_PROMPTS, add_groups
from .prompts import gathered_prompts, require_text
from .values import (
    parse_devices,
    parse_interval,
    parse_lora,
    parse_named,
    parse_number,
    parse_settings,
    parse_size,
    parse_timesteps,
)

EPILOG = """\
example:
  tandemrt generate bundle/ --prompt "a red circle left of a blue square" --steps 10,15 --seed 7

Each PNG holds as text what painted it: prompt, negative_prompt, seed, plan, bundle (its digest), target, tandemrt (the
version), and request, the arguments that `Pipeline.open(bundle)(**request)` paints it from again. Where it was painted
from other pictures, `pictures` names their files with path and sha256, by the argument they are to be given as; `loras`
holds the sha256 of each LoRA's files.
A preview holds those of its final picture, and row, the number of rows of the plan that had run when it was painted;
where `auto` placed the branches, its plan says that.
"""


@dataclass(frozen=True, slots=True)
class GeneratePlan:
    """What to paint; None stands for the bundle's default, and for the seed a random one.

    further_prompts: those of further text encoders, by argument of `Request`.
    control, control_scale, control_interval: by ControlNet, or under None for the only one, or for all.
    """

    bundle: Path
    prompts: tuple[str, ...]
    negative_prompt: str | None
    further_prompts: Mapping[str, str | None]
    image: Path | None
    mask: Path | None
    strength: float | None
    control: Mapping[str | None, Path]
    control_scale: Mapping[str | None, float]
    control_interval: Mapping[str | None, tuple[float, float]]
    loras: Mapping[Path, float]
    steps: str | None
    num_inference_steps: int | None
    solver: str | None
    solver_config: Mapping[str, Any]
    timesteps: tuple[int, ...] | None
    eta: float | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    guidance: str
    guidance_config: Mapping[str, Any]
    placement: str
    placement_config: Mapping[str, Any]
    seed: int | None
    seed_device: str
    width: int | None
    height: int | None
    num_images_per_prompt: int
    decoder: str | None
    target: str
    threads: int | None
    devices: tuple[int, ...] | None
    cache: Path | None
    cloud: Cloud | None
    output_dir: Path
    previews: int
    trace: Path | None
    strict_prompts: bool
    force: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Paint pictures from prompts with a bundle, and write them as PNG files."
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    add_groups(parser)
    add_cloud(parser)


def _loras(given: Sequence[str]) -> dict[Path, float]:
    """LoRAs by path; RequestError where one is given twice."""
    loras = [parse_lora(text) for text in given]
    found = dict(loras)
    if len(found) < len(loras):
        raise RequestError("--lora", "a file given twice", got=list(given), expected="every file once")
    return found


def plan_from_arguments(namespace: argparse.Namespace) -> GeneratePlan:
    """The command line as a plan; the prompts file is read here.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    width, height = namespace.width, namespace.height
    if namespace.size is not None:
        if width is not None or height is not None:
            raise RequestError("--size", "given beside --width or --height", remedy="Give one of them.")
        width, height = parse_size(namespace.size)
    thread_count("--threads", namespace.threads)
    for name in ("negative_prompt", *FURTHER_PROMPTS):
        if getattr(namespace, name) is not None:
            require_text(f"--{name.replace('_', '-')}", getattr(namespace, name))
    require_pictures(namespace.num_images_per_prompt)
    interval = namespace.guidance_interval
    parsed = {
        "prompts": gathered_prompts(namespace.prompt, namespace.prompts_file),
        "solver_config": parse_settings("--solver-config", namespace.solver_config),
        "placement_config": parse_settings("--placement-config", namespace.placement_config),
        "guidance_config": parse_settings("--guidance-config", namespace.guidance_config),
        "timesteps": None if namespace.timesteps is None else parse_timesteps(namespace.timesteps),
        "guidance_interval": None if interval is None else parse_interval("--guidance-interval", interval),
        "further_prompts": {name: getattr(namespace, name) for name in FURTHER_PROMPTS},
        "control": {name: Path(file) for name, file in parse_named("--control", namespace.control).items()},
        "control_scale": {
            name: parse_number("--control-scale", value)
            for name, value in parse_named("--control-scale", namespace.control_scale).items()
        },
        "loras": _loras(namespace.lora),
        "control_interval": {
            name: parse_interval("--control-interval", value)
            for name, value in parse_named("--control-interval", namespace.control_interval).items()
        },
        "cloud": cloud_from(namespace),
        "devices": None if namespace.devices is None else parse_devices("--devices", namespace.devices),
        "width": width,
        "height": height,
    }
    there = CLOUD in (namespace.steps or "")
    if there and parsed["cloud"] is None:
        raise ArgumentError("--steps", "name a server's denoiser", got=namespace.steps, remedy="Give --cloud URL.")
    if parsed["cloud"] is not None and not there:
        remedy = f"Name one, such as --steps {CLOUD}unet:10,unet_small:15."
        raise ArgumentError("--cloud", "given, but --steps name no denoiser of the server's", remedy=remedy)
    as_given = {name: getattr(namespace, name) for name in GeneratePlan.__slots__ if name not in parsed}
    return GeneratePlan(**as_given, **parsed)
