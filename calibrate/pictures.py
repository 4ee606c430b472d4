"""`tandemrt calibrate pictures`: a picture of each of many prompts; an interrupted run goes on where it was."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ..runtime.cli.pictures import check_folder, png_facts
from ..runtime.cli.prompts import require_text
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError
from ..runtime.images import png_bytes
from ..runtime.pipeline import Pipeline
from ..runtime.plan_steps import parse_steps
from ..runtime.targets import installed_version
from .prompts import chosen_prompts, prompt_lines, prompts_sha256
from .run_folder import RunFolder
from .shared_arguments import (
    add_bundle,
    add_discard,
    add_pictures,
    add_place,
    add_prompts,
    add_seed,
    check_number,
    check_shared,
)

DESCRIPTION = (
    "Paint one picture of each prompt of a file, for measures that need thousands. Picture i is painted of prompt i "
    "from seed SEED + i, whatever else is painted beside it. Started again, an interrupted run goes on."
)
EPILOG = """\
examples:
  tandemrt calibrate pictures bundle/ --prompts captions.csv --column caption -n 5000 --out pictures/
  tandemrt calibrate pictures bundle/ --prompts captions.txt -n 5000 --out split/ --steps 10,15 --guidance-scale 7
"""

FORMAT = 3
LEDGER = "run.jsonl"
FILE_NAMES = r"[0-9]{6}\.png"
MAX_BATCH = 1024


@dataclass(frozen=True, slots=True)
class PicturesPlan:
    """What to paint; None stands for the bundle's default. `settings` are arguments of `Request`.

    lines: of the file, where each of `prompts` is first. repeated: how many more of its lines hold one of these again.
    """

    bundle: Path
    prompts: tuple[str, ...]
    lines: tuple[int, ...]
    repeated: int
    out: Path
    steps: str | None
    settings: Mapping[str, Any]
    seed: int
    batch: int
    target: str
    threads: int | None
    cache: Path | None
    discard: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate pictures`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_bundle(parser)
    what = parser.add_argument_group("what to paint")
    add_prompts(what, "to paint", None)
    add_seed(what)
    _add_how(parser.add_argument_group("how to paint it"))
    where = parser.add_argument_group("where to run, where to write")
    add_place(where)
    where.add_argument("--batch", type=int, default=1, metavar="N", help="prompts painted together (default: 1)")
    where.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pictures go, named NUMBER.png")
    add_discard(where)


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", metavar="STEPS", help="25, 10,15 or unet:10,unet_small:15, as in `tandemrt generate`")
    group.add_argument("--solver", metavar="NAME", help="the bundle's scheduler by default")
    add_pictures(group)
    group.add_argument("--decoder", metavar="NAME", help="which of the bundle's decoders paints; its first by default")


SETTINGS = ("solver", "guidance_scale", "negative_prompt", "width", "height", "decoder")


def plan_from_arguments(namespace: argparse.Namespace) -> PicturesPlan:
    """The command line as a plan; the prompts file is read here.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    check_shared(namespace)
    check_number("--batch", namespace.batch, MAX_BATCH)
    if namespace.negative_prompt is not None:
        require_text("--negative-prompt", namespace.negative_prompt)
    prompts = chosen_prompts(namespace.prompts, namespace.column, namespace.count, None)
    lines, repeated = prompt_lines(namespace.prompts, namespace.column, prompts)
    return PicturesPlan(
        bundle=namespace.bundle,
        prompts=prompts,
        lines=lines,
        repeated=repeated,
        out=namespace.out,
        steps=namespace.steps,
        settings={name: getattr(namespace, name) for name in SETTINGS},
        seed=namespace.seed,
        batch=namespace.batch,
        target=namespace.target,
        threads=namespace.threads,
        cache=namespace.cache,
        discard=namespace.discard,
    )


def plan_facts(plan: PicturesPlan) -> dict[str, Any]:
    """What would be painted, JSON-able; no model is loaded and no file written.

    Raises:
        TandemError: the bundle, an argument or the target cannot be used.
    """
    with _opened(plan) as pipe:
        ground = _ground(plan, pipe)
    folder = RunFolder(plan.out, LEDGER, FILE_NAMES, ground, discard=plan.discard)
    there = folder.there()
    _require_prefix(plan, there)
    missing = len(plan.prompts) - len(there)
    return {**ground, **_prompt_facts(plan), "out": str(plan.out), "batch": plan.batch, "missing": missing}


def run(plan: PicturesPlan, reporter: Reporter) -> dict[str, Any]:
    """Paint the pictures that are not there yet; each appears whole as soon as it is painted.

    Raises:
        TandemError: the bundle, an argument or the target cannot be used, the folder holds something else, a file
            cannot be written, or a model failed.
    """
    if plan.repeated:
        reporter.note(f"{plan.repeated} lines of the prompts' file hold a prompt again, which is painted once")
    with _opened(plan) as pipe:
        ground = _ground(plan, pipe)
        check_folder((plan.out / LEDGER,), force=True, option="--out")
        with RunFolder(plan.out, LEDGER, FILE_NAMES, ground, discard=plan.discard) as folder:
            _require_prefix(plan, folder.found)
            painted = _painted(plan, pipe, folder, reporter)
    return {**ground, **_prompt_facts(plan), "out": str(plan.out), **painted}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """How many pictures there are, and how many of them this run made."""
    yield (
        f"{result['count']} pictures in {result['out']}, {result['made']} of them made in {result['seconds']:.1f} s on "
        f"{result['target']}"
    )


def _painted(plan: PicturesPlan, pipe: Pipeline, folder: RunFolder, reporter: Reporter) -> dict[str, Any]:
    """Paint what is missing, text, rows and decoding of consecutive requests at once."""
    began, total = time.perf_counter(), len(plan.prompts)
    missing = folder.missing([_name(index) for index in range(total)], "pictures", reporter)
    batches = [missing[start : start + plan.batch] for start in range(0, len(missing), plan.batch)]
    target = pipe.target.told(pipe.bundle.manifest)
    facts = {"bundle": pipe.bundle.digest, "target": target, "tandemrt": version("tandemrt")}
    made = dropped = 0
    for batch, output in zip(batches, pipe.map(_request(plan, pipe, batch) for batch in batches), strict=True):
        request, images = _request(plan, pipe, batch), cast("tuple[Image.Image, ...]", output.images)
        for index, image in zip(batch, images, strict=True):
            prompt, seed = plan.prompts[index], plan.seed + index
            told = png_facts({**request, "prompt": prompt, "seed": [seed]}, seed, facts)
            folder.add(_name(index), png_bytes(image, told), {"prompt": prompt, "line": plan.lines[index]})
        made, dropped = made + len(batch), dropped + len(output.dropped_text)
        reporter.progress("pictures", total - len(missing) + made, total)
    if dropped:
        reporter.warn(f"{dropped} of the prompts painted now were too long for a text encoder, and were cut")
    return {"target": target, "made": made, "cut": dropped, "seconds": round(time.perf_counter() - began, 3)}


def _opened(plan: PicturesPlan) -> Pipeline:
    return Pipeline.open(plan.bundle, plan.target, threads=plan.threads, cache=plan.cache)


def _ground(plan: PicturesPlan, pipe: Pipeline) -> dict[str, Any]:
    """All that decides a prompt's picture; the first request is checked, which the others are like."""
    pipe.stream(**_request(plan, pipe, [0]))
    return {
        "format": FORMAT,
        "bundle": pipe.bundle.digest,
        "target": str(pipe.target),
        "versions": {"tandemrt": version("tandemrt"), pipe.target.backend: installed_version(pipe.target.backend)},
        "seed": plan.seed,
        "settings": {"steps": plan.steps, **plan.settings},
    }


def _prompt_facts(plan: PicturesPlan) -> dict[str, Any]:
    return {"prompts": prompts_sha256(plan.prompts), "count": len(plan.prompts), "repeated": plan.repeated}


def _require_prefix(plan: PicturesPlan, found: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless the pictures that are there are of the first prompts that are to be painted."""
    prompts = {_name(index): prompt for index, prompt in enumerate(plan.prompts)}
    for name, facts in sorted(found.items()):
        if prompts.get(name) != facts["prompt"]:
            what = f"holds {name} of another prompt" if name in prompts else f"holds {name}, beyond the last prompt"
            remedy = "Give the same prompts, or these and more, to go on, another --out, or --discard to start over."
            got, expected = facts["prompt"], prompts.get(name, f"{len(prompts)} pictures")
            raise ArgumentError(str(plan.out), what, got=got, expected=expected, remedy=remedy)


def _request(plan: PicturesPlan, pipe: Pipeline, batch: Sequence[int]) -> dict[str, Any]:
    """The arguments of `Request` for the pictures of these indices, JSON-able."""
    steps = None if plan.steps is None else parse_steps(plan.steps, pipe.bundle.manifest.names("denoiser"))
    return {
        "prompt": [plan.prompts[index] for index in batch],
        "seed": [plan.seed + index for index in batch],
        "steps": None if steps is None else [list(run) for run in steps],
        **plan.settings,
    }


def _name(index: int) -> str:
    return f"{index:06d}.png"
