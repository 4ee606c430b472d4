"""The `export-triton` command: its arguments, and what it says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.cache import require_folder
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError
from ..runtime.staging import require_free
from ..runtime.targets import Target, parse_target
from .profiles import Profile, check_profiles, default_profile, parse_profile
from .together import for_each
from .triton import REPOSITORY, Source, repository, source_of

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "summary"]

SERVED = ("onnxruntime:cpu", "onnxruntime:cuda", "tensorrt:smNN", "tensorrt:portable")
DESCRIPTION = (
    "Write a model repository for NVIDIA's Triton Inference Server: every component of a bundle as a model with its "
    "config.pbtxt, as the ONNX graph that it is, or as a plan that `tandemrt build-engine --target tensorrt:…` has "
    "built. Triton runs the models; prompts become tokens, and steps pictures, at its client."
)
EPILOG = """\
batches:
  Graphs take batches up to the most that a profile's calls have: its pictures, twice where both branches of guidance
  run. Plans take those of their own optimization profiles, all of which Triton is told of.

examples:
  tandemrt export-triton bundle/ models/ --profile 512x512:b1-b8
  tandemrt export-triton bundle/ models/ --target onnxruntime:cuda --component unet --component vae_decoder
  tandemrt export-triton bundle/ models/ --target onnxruntime:cuda --target unet=tensorrt:sm90:fp16
"""


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A repository to write.

    target: of the components that have none of their own. components: all where none is named. profiles: calls that
    models are to take; the bundle's default size where none is given.
    """

    bundle: Path
    out: Path
    target: Target
    own: Mapping[str, Target]
    components: tuple[str, ...]
    profiles: tuple[Profile, ...]
    cache: Path | None
    force: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt export-triton`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    parser.add_argument("out", type=Path, metavar="OUT", help="the repository to make; must not exist, see --force")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="[NAME=]TARGET",
        help=f"what models are for: {', '.join(SERVED)}, each perhaps with :PRECISION; with NAME= for one component "
        "alone (default: onnxruntime:cpu)",
    )
    parser.add_argument(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="a component to serve, such as unet; may be given several times (default: all)",
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="PROFILE",
        help="sizes and pictures per call that models are to take, as of `tandemrt build-engine`; may be given several "
        "times (default: one picture of the bundle's default size)",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where plans are; see build-engine")
    parser.add_argument("--force", action="store_true", help="replace OUT where it is such a repository already")


def plan_from_arguments(args: argparse.Namespace) -> TritonPlan:
    """The plan that the arguments describe.

    Raises:
        ArgumentError: a value cannot be used.
    """
    own: dict[str, Target] = {}
    for name, target in for_each(args.target or ["onnxruntime:cpu"], _named_target, "--target"):
        if name in own:
            raise ArgumentError("--target", "given twice", got=name or "without a component's name")
        own[name] = target
    twice = next((name for name in args.component if args.component.count(name) > 1), None)
    if twice is not None:
        raise ArgumentError("--component", "given twice", got=twice)
    require_folder(args.cache)
    return TritonPlan(
        bundle=args.bundle,
        out=args.out,
        target=own.pop("", parse_target("onnxruntime:cpu")),
        own=own,
        components=tuple(args.component),
        profiles=for_each(args.profile, parse_profile, "--profile"),
        cache=args.cache,
        force=args.force,
    )


def _named_target(text: str) -> tuple[str, Target]:
    """A component's name, perhaps empty, and its target; ArgumentError where Triton does not run it."""
    name, equals, told = text.rpartition("=")
    if equals and not name:
        raise ArgumentError("--target", "no component's name", got=text, expected="NAME=TARGET, or a target alone")
    target = parse_target(told)
    expected = f"one of {', '.join(SERVED)}"
    if target.backend == "tensorrt-rtx":
        what = "Triton runs plans of TensorRT, and no engines of TensorRT-RTX"
        raise ArgumentError("--target", what, got=text, expected=expected)
    served = target.backend == "tensorrt" or (target.backend == "onnxruntime" and target.device in ("cpu", "cuda"))
    if not served or "+" in target.device:
        raise ArgumentError("--target", "not exported for Triton", got=text, expected=expected)
    return name, target


def plan_facts(plan: TritonPlan) -> dict[str, Any]:
    """What `--print-plan` shows: every model with its target, batches and size."""
    bundle = Bundle.open(plan.bundle)
    return _facts(plan, _sources(plan, bundle))


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The models as lines."""
    for model in facts["models"]:
        batches = f"batches up to {model['max_batch_size']}" if model["max_batch_size"] else "no batches"
        plan = f", plan of TensorRT {model['tensorrt']}, {model['profiles']} profiles" if model["tensorrt"] else ""
        yield f"{model['name']}: {model['target']}, {batches}, {model['size_bytes'] / 1e6:.1f} MB{plan}"


def run(plan: TritonPlan, reporter: Reporter) -> dict[str, Any]:
    """Write the repository; the result is in JSON's types.

    Raises:
        TandemError: see `source_of` and `repository`.
    """
    require_free(plan.out, force=plan.force, kind=REPOSITORY)
    bundle = Bundle.open(plan.bundle)
    sources = _sources(plan, bundle)
    repository(bundle, sources, plan.out, force=plan.force, progress=reporter.progress)
    if any(source.version_compatible for source in sources.values()):
        reporter.note("plans built with --version-compatible: start Triton with "
                      "--backend-config=tensorrt,version-compatible=true")  # fmt: skip
    return _facts(plan, sources)


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as lines."""
    yield from plan_lines(result)
    yield f"{result['out']}: {len(result['models'])} models for `tritonserver --model-repository`"
    versions = sorted({model["tensorrt"] for model in result["models"] if model["tensorrt"]})
    if versions:
        yield f"Triton has to bring TensorRT {' and '.join(versions)}, which the plans were built by"


def _sources(plan: TritonPlan, bundle: Bundle) -> dict[str, Source]:
    names = plan.components or tuple(bundle.manifest.components)
    bundle.require_components("--component", names)
    bundle.require_components("--target", plan.own)
    left_out = next((name for name in plan.own if name not in names), None)
    if left_out is not None:
        raise ArgumentError("--target", "for a component that is left out", got=left_out, expected=", ".join(names))
    profiles = plan.profiles or (default_profile(bundle.manifest),)
    check_profiles(profiles, bundle.manifest, names)
    for target in {plan.target, *plan.own.values()}:
        target.check_quantized(str(bundle.path), bundle.manifest)
    return {name: source_of(bundle, name, plan.own.get(name, plan.target), profiles, plan.cache) for name in names}


def _facts(plan: TritonPlan, sources: Mapping[str, Source]) -> dict[str, Any]:
    models = [
        {
            "name": name,
            "target": str(source.target),
            "max_batch_size": source.model.max_batch_size,
            "size_bytes": source.size_bytes,
            "profiles": source.model.profiles,
            "engine": source.served.engine,
            "tensorrt": source.served.tensorrt,
        }
        for name, source in sources.items()
    ]
    return {"bundle": str(plan.bundle), "out": str(plan.out), "models": models}
