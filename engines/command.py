"""The `build-engine` command: its arguments, what it says before and after. Backends are imported by what they do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.cache import cache_folder
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError, CacheError, CacheFullError
from ..runtime.targets import Target, parse_target
from .build import ensure_engine
from .estimate import memory_bytes
from .flavour import Options
from .ingredients import require_buildable
from .plan import BuildPlan, Request, requests_of
from .profiles import parse_profile
from .together import for_each
from .told import (
    engine_line,
    failure_facts,
    outcome_facts,
    plan_lines,
    request_facts,
    request_line,
    summary,
    target_facts,
)

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "status", "summary"]

# What no other build would end better for: the cache, a package that is not installed, nobody who reads.
_OF_ALL = (CacheError, ImportError, BrokenPipeError)
DESCRIPTION = (
    "Compile a bundle's models ahead of time for what they run on. Engines go to a cache of your own, under a digest "
    "of everything they depend on: asked for again, one is there at once; when anything has changed, it is built anew. "
    "TensorRT-RTX engines need no GPU to be built. For TensorRT's flavours, beside whatever is made of a denoiser an "
    "update engine is built, which does the rest of a step on the GPU."
)
EPILOG = """\
targets:
  onnxruntime:cpu  onnxruntime:cuda         the graph optimized for one execution provider
  openvino:cpu  openvino:cpu:bf16           a compiled blob; bf16 of an fp32 or fp16 bundle where the processor has it
  openvino:gpu                              where OpenVINO has one
  tensorrt-rtx:sm89+sm120:fp16              for these GPUs, built anywhere; of a bundle exported with --dtype fp16
  tensorrt-rtx:sm89:bf16                    of such a bundle too: its graph with bfloat16 for every float16
  tensorrt-rtx:portable                     for any RTX GPU from Ampere on; else sm75 sm80 sm86 sm89 sm120 sm121
  tensorrt:sm90:fp16                        on that GPU; tensorrt:portable from Ampere on

profiles, in pixels:
  512x512                                   one picture a call, with guidance and without
  512x512:b1-b4                             one to four pictures
  512..768x512..768:b1..4:opt=512x512:b1    sizes and pictures in between, tuned for one of them
  fast=512x512:guided                       named; both guidance branches always, so nothing varies (or: unguided)

examples:
  tandemrt build-engine bundle/ --target openvino:cpu:bf16
  tandemrt build-engine bundle/ --target tensorrt-rtx:sm89+sm120 --profile 512x512 --profile 512..1024x512..1024:b1-b4
  tandemrt build-engine bundle/ --target auto --component unet --explain
  tandemrt build-engine bundle/ --target openvino:cpu --lora-slots 2 --lora-rank 32
  tandemrt build-engine bundle/ --target tensorrt-rtx:sm89 --refit
  tandemrt build-engine bundle/ --target tensorrt-rtx:sm89 --component unet --step --fold-steps 25
  tandemrt build-engine bundle/ --target tensorrt-rtx:sm89 --component unet --stages 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt build-engine`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="TARGET",
        help="BACKEND:DEVICE[:PRECISION], see below, or auto for what this machine runs best; may be given several "
        "times",
    )
    parser.add_argument(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="a component to build, such as unet; may be given several times (default: all)",
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="PROFILE",
        help="sizes and pictures per call that the engine is to take, see below; may be given several times (default: "
        "one picture of the bundle's default size)",
    )
    parser.add_argument(
        "--step",
        action="store_true",
        help="step engines of the denoisers: guidance and the solver's update in the graph, so that one call is one "
        "step; for both branches or one, as a profile says or the bundle's guidance is by default",
    )
    parser.add_argument(
        "--fold-steps",
        type=_steps,
        nargs="?",
        const=0,
        metavar="N",
        help="build the time steps of N inference steps of the bundle's own scheduler into step engines, which then "
        "take no others (without N: those of the bundle's defaults)",
    )
    parser.add_argument(
        "--lora-slots",
        type=int,
        default=0,
        metavar="N",
        help="let denoisers and text encoders take up to N LoRAs with each request; see --lora-rank",
    )
    parser.add_argument("--lora-rank", type=int, default=0, metavar="R", help="the largest rank that a slot takes")
    parser.add_argument(
        "--refit",
        action="store_true",
        help="TensorRT engines of denoisers and text encoders that take LoRAs into their weights without being built "
        "again, one set at a time; for TensorRT-RTX on a machine with a GPU alone",
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="TensorRT engines that run on newer versions of the same major too, on the lean runtime they then carry; "
        "for TensorRT-RTX on a machine with a GPU alone",
    )
    parser.add_argument(
        "--stages",
        type=int,
        default=0,
        metavar="N",
        help="cut the denoisers into N stages of even work, 2 to 4, and build an engine of each; whole ones are built "
        "without this option and, for TensorRT's flavours, with it, as all that a window needs",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where engines are kept (default: $TANDEMRT_CACHE, else tandemrt/ in $XDG_CACHE_HOME or ~/.cache)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say which engines are in the cache, what has changed for the others, and build nothing",
    )


def _steps(text: str) -> int:
    """A number of steps: 0, which stands for the bundle's default, is what the option alone gives."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"not a number of steps from 1 on: {text!r}")
    return int(text)


def plan_from_arguments(args: argparse.Namespace) -> BuildPlan:
    """The plan that the arguments describe.

    Raises:
        ArgumentError: a value that cannot be used.
    """
    options = Options(refit=args.refit, version_compatible=args.version_compatible)
    return BuildPlan(
        bundle=args.bundle,
        targets=_targets(args.target, options),
        cache=cache_folder(args.cache),
        components=tuple(args.component),
        profiles=for_each(args.profile, parse_profile, "--profile"),
        explain=args.explain,
        lora_slots=args.lora_slots,
        lora_rank=args.lora_rank,
        step=args.step,
        fold_steps=args.fold_steps,
        options=options,
        stages=args.stages,
    )


def _targets(texts: Sequence[str], options: Options) -> tuple[Target, ...]:
    """The targets of these names; where one is none, what keeps the others from being built for is told with it."""

    def buildable(text: str) -> Target:
        target = parse_target(text)
        require_buildable(target, options)
        return target

    try:
        return for_each(texts, parse_target, "--target")
    except ArgumentError:
        return for_each(texts, buildable, "--target")


def plan_facts(plan: BuildPlan) -> dict[str, Any]:
    """What `--print-plan` shows: every engine with its profiles, what it takes, and why it is to be built."""
    bundle = Bundle.open(plan.bundle)
    return {
        "bundle": str(plan.bundle),
        "cache": str(plan.cache),
        "targets": [target_facts(target) for target in plan.targets],
        "engines": [request_facts(request, plan.cache) for request in requests_of(plan, bundle)],
    }


def run(plan: BuildPlan, reporter: Reporter) -> dict[str, Any]:
    """Do what the plan says; the result is in JSON's types.

    What is asked for is checked before anything is built. A build that fails is told, and leaves the others alone;
    where it is the only one, or the cache cannot be written, it is an error.

    Raises:
        TandemError: see `requests_of` and `ensure_engine`.
    """
    if plan.explain:
        return plan_facts(plan)
    from importlib import metadata  # noqa: PLC0415 (slower than a whole --help)

    bundle = Bundle.open(plan.bundle)
    requests = requests_of(plan, bundle)
    for target in plan.targets:
        if target.reason:
            reporter.line(f"target {target}: {target.reason}")
    versions = {"tandemrt": metadata.version("tandemrt")}
    engines = []
    for request in requests:
        _say_beforehand(request, plan.cache, reporter)
        try:
            outcome = ensure_engine(request, plan.cache, reporter.progress, versions)
        except Exception as error:  # builders fail in any way
            smaller_may_fit = isinstance(error, CacheFullError)
            if len(requests) == 1 or (isinstance(error, _OF_ALL) and not smaller_may_fit):
                raise
            facts = failure_facts(request, error)
            reporter.warn(engine_line(facts))
        else:
            facts = outcome_facts(outcome)
            reporter.line(engine_line(facts))
        engines.append(facts)
    return {"bundle": str(plan.bundle), "cache": str(plan.cache), "engines": engines}


def status(result: Mapping[str, Any]) -> int:
    """The exit status: 1 where an engine could not be built."""
    return int(any("error" in engine for engine in result["engines"]))


def _say_beforehand(request: Request, cache: Path, reporter: Reporter) -> None:
    facts = request_facts(request, cache)
    if facts["cached"]:
        return
    reporter.line(request_line(facts))
    available, needed = memory_bytes("MemAvailable"), facts["estimated_memory_bytes"]
    if available is not None and available < needed:
        reporter.warn(
            f"{request.title}: only {available / 1e9:.1f} GB of memory are available; the build may be killed"
        )
    too_large = [call["profile"] for call in facts["calls"] if call["exceeds_memory"]]
    if too_large:
        reporter.warn(
            f"{request.title}: by estimate, the largest call at {' and '.join(too_large)} takes more memory than this "
            "machine has"
        )
