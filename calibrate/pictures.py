"""`tandemrt calibrate pictures`: a picture of each of many prompts; an interrupted run goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ..runtime.arguments import thread_count
from ..runtime.cli.pictures import check_folder, png_facts, write_picture
from ..runtime.cli.prompts import require_text
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError
from ..runtime.output import Output
from ..runtime.pipeline import Pipeline
from ..runtime.plan_steps import parse_steps
from .collection import alone
from .ledger import writing
from .prompts import read_prompts
from .run_folder import RUN_FILE, begin_run

DESCRIPTION = (
    "Paint one picture of each prompt of a file, for measures that need thousands. Picture i is painted of prompt i "
    "from seed SEED + i, whatever else is painted beside it. Started again, an interrupted run goes on."
)
EPILOG = """\
examples:
  tandemrt calibrate pictures bundle/ --prompts captions.csv --column caption -n 5000 --out pictures/
  tandemrt calibrate pictures bundle/ --prompts captions.txt -n 5000 --out split/ --steps 10,15 --guidance-scale 7
"""

FORMAT = 1


@dataclass(frozen=True, slots=True)
class PicturesPlan:
    """What to paint; None stands for the bundle's default. `settings` are arguments of `Request`."""

    bundle: Path
    prompts: tuple[str, ...]
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
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="prompts, one a line, or a CSV file with a column of them",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="the column (default: the first there is of caption, prompt and text)"
    )
    parser.add_argument("-n", dest="count", type=int, metavar="N", help="the first N prompts alone (default: all)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the pictures go, named NUMBER.png"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first picture's seed (default 0)")
    parser.add_argument(
        "--steps", metavar="STEPS", help="25, 10,15 or unet:10,unet_small:15, as in `tandemrt generate`"
    )
    parser.add_argument("--solver", metavar="NAME", help="the bundle's scheduler by default")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="how strongly the prompt counts; 1 is off")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from, for every prompt")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="the bundle's default otherwise")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="the bundle's default otherwise")
    parser.add_argument("--decoder", metavar="NAME", help="which of the bundle's decoders paints; its first by default")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts painted together (default 1)")
    parser.add_argument(
        "--target", default="auto", metavar="TARGET", help="such as onnxruntime:cpu:fp32 (default auto)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads a model may use")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where engines are that `tandemrt build-engine` made")
    parser.add_argument("--discard", action="store_true", help="start over where DIR holds a run, of any settings")


SETTINGS = ("solver", "guidance_scale", "negative_prompt", "width", "height", "decoder")


def plan_from_arguments(namespace: argparse.Namespace) -> PicturesPlan:
    """The command line as a plan; the prompts file is read here.

    Raises:
        ArgumentError: an option's value cannot be used.
    """
    thread_count("--threads", namespace.threads)
    for option, value in (("-n", namespace.count), ("--batch", namespace.batch)):
        if value is not None and value < 1:
            raise ArgumentError(option, "not usable", got=value, expected="a whole number from 1 on")
    if namespace.negative_prompt is not None:
        require_text("--negative-prompt", namespace.negative_prompt)
    prompts = read_prompts(namespace.prompts, namespace.column)
    count = len(prompts) if namespace.count is None else namespace.count
    if count > len(prompts):
        remedy = f"Give -n {len(prompts)}, or more prompts."
        raise ArgumentError(str(namespace.prompts), "prompts", got=len(prompts), expected=f"-n {count}", remedy=remedy)
    return PicturesPlan(
        bundle=namespace.bundle,
        prompts=prompts[:count],
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
        run_facts = _run_facts(plan, pipe)
    missing = sum(not _path(plan, index).exists() for index in range(len(plan.prompts)))
    return {**run_facts, "out": str(plan.out), "batch": plan.batch, "missing": missing}


def run(plan: PicturesPlan, reporter: Reporter) -> dict[str, Any]:
    """Paint the pictures that are not there yet; each appears whole as soon as it is painted.

    Raises:
        TandemError: the bundle, an argument or the target cannot be used, the folder holds something else, a file
            cannot be written, or a model failed.
    """
    with _opened(plan) as pipe:
        facts = _run_facts(plan, pipe)
        check_folder((plan.out / RUN_FILE,), force=True, option="--out")
        with alone(plan.out):
            with writing(plan.out):
                begin_run(plan.out, facts, _files_of, discard=plan.discard)
            return {**facts, "out": str(plan.out), **_painted(plan, pipe, facts, reporter)}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """How many pictures there are, and how many of them this run made."""
    yield (
        f"{result['count']} pictures in {result['out']}, {result['made']} of them made in {result['seconds']:.1f} s on "
        f"{result['target']}"
    )


def _painted(plan: PicturesPlan, pipe: Pipeline, facts: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Paint what is missing, text, rows and decoding of consecutive requests at once."""
    began, total = time.perf_counter(), len(plan.prompts)
    missing = [index for index in range(total) if not _path(plan, index).exists()]
    if len(missing) < total:
        reporter.note(f"goes on with {total - len(missing)} of {total} pictures there")
    batches = [missing[start : start + plan.batch] for start in range(0, len(missing), plan.batch)]
    recorded = {name: facts[name] for name in ("bundle", "target", "tandemrt")}
    made = dropped = 0
    for batch, output in zip(batches, pipe.map(_request(plan, pipe, batch) for batch in batches), strict=True):
        _write(plan, _request(plan, pipe, batch), batch, output, recorded)
        made, dropped = made + len(batch), dropped + len(output.dropped_text)
        reporter.progress("pictures", total - len(missing) + made, total)
    if dropped:
        reporter.warn(f"{dropped} of the prompts painted now were too long for a text encoder, and were cut")
    return {"made": made, "cut": dropped, "seconds": round(time.perf_counter() - began, 3)}


def _opened(plan: PicturesPlan) -> Pipeline:
    return Pipeline.open(plan.bundle, plan.target, threads=plan.threads, cache=plan.cache)


def _run_facts(plan: PicturesPlan, pipe: Pipeline) -> dict[str, Any]:
    """All that decides the pictures, in JSON's types; the first request is checked, which the others are like."""
    pipe.stream(**_request(plan, pipe, [0]))
    return {
        "format": FORMAT,
        "tandemrt": version("tandemrt"),
        "bundle": pipe.bundle.digest,
        "target": str(pipe.target),
        "prompts": hashlib.sha256("\n".join(plan.prompts).encode()).hexdigest(),
        "count": len(plan.prompts),
        "seed": plan.seed,
        "settings": {"steps": plan.steps, **plan.settings},
    }


def _request(plan: PicturesPlan, pipe: Pipeline, batch: Sequence[int]) -> dict[str, Any]:
    """The arguments of `Request` for the pictures of these indices, JSON-able."""
    steps = None if plan.steps is None else parse_steps(plan.steps, pipe.bundle.manifest.names("denoiser"))
    return {
        "prompt": [plan.prompts[index] for index in batch],
        "seed": [plan.seed + index for index in batch],
        "steps": None if steps is None else [list(run) for run in steps],
        **plan.settings,
    }


def _write(
    plan: PicturesPlan, request: Mapping[str, Any], batch: Sequence[int], output: Output, facts: Mapping[str, Any]
) -> None:
    images = cast("tuple[Image.Image, ...]", output.images)
    for index, image in zip(batch, images, strict=True):
        alone = {**request, "prompt": plan.prompts[index], "seed": [plan.seed + index]}
        write_picture(image, _path(plan, index), png_facts(alone, plan.seed + index, facts), force=True)


def _path(plan: PicturesPlan, index: int) -> Path:
    return plan.out / _name(index)


def _name(index: int) -> str:
    return f"{index:06d}.png"


def _files_of(facts: Mapping[str, Any]) -> Iterator[str]:
    return map(_name, range(facts["count"]))
