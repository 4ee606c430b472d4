"""The `export` command: its arguments, and what it reports. Nothing heavy is imported before there is work to do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runtime.cli.reporter import Reporter
from ..runtime.cli.values import parse_settings, parse_sources, parse_timesteps
from ..runtime.errors import ArgumentError
from ..runtime.staging import require_free
from .pickled import WARNING as PICKLE_WARNING
from .plan import Added, ExportPlan, PresetPlan, parse_lora
from .presets import SCALES, models, preset_names, read_preset
from .sources import describe

DESCRIPTION = (
    "Turn a Stable Diffusion checkpoint into a verified ONNX bundle. Every component is compared with PyTorch before "
    "anything is published; one that misses its threshold leaves nothing behind."
)
EPILOG = """\
examples:
  tandemrt export stable-diffusion-v1-5/ bundle/ --small small-sd/ --tiny-vae taesd/
  tandemrt export stable-diffusion-v1-5/ bundle/ --lora Hyper-SD15-8steps-lora.safetensors --lora style.safetensors:0.6
  tandemrt export sd_xl_base_1.0.safetensors bundle/ --tokenizer stable-diffusion-xl-base-1.0/
  tandemrt export optimum-export/ bundle/ --verify-against stable-diffusion-v1-5/
  tandemrt export bundle/ --preset hybrid-sd
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt export`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    _add_sources(parser)
    _add_preset(parser.add_argument_group("random weights, to measure a device before downloading any"))
    _add_defaults(parser.add_argument_group("what the bundle is sampled with where a request says nothing"))
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16"),
        default="fp32",
        help="precision of weights and arithmetic (default: fp32); inputs and outputs are fp32 in both",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it is a bundle already")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="CHECKPOINT",
        help="a diffusers directory (model_index.json), one .safetensors file in its authors' layout, or an export by "
        "optimum, whose graphs are adapted as they are",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle to make; must not exist, see --force")
    parser.add_argument(
        "--small",
        type=Path,
        metavar="CHECKPOINT",
        help="a small UNet to run in tandem with the large one; short for --add unet_small=CHECKPOINT",
    )
    parser.add_argument(
        "--tiny-vae", type=Path, metavar="DIR", help="a tiny autoencoder; short for --add vae_decoder_tiny=DIR"
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a further denoiser (unet_NAME, transformer_NAME), decoder (vae_decoder_NAME) or ControlNet "
        "(controlnet_NAME); may be given several times",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="where a CHECKPOINT of one file finds its tokenizers: a pipeline directory, or a tokenizer's own folder",
    )
    parser.add_argument(
        "--denoiser",
        type=Path,
        metavar="SOURCE",
        help="the UNet or transformer in place of CHECKPOINT's, which is then the teacher that text encoders and VAE "
        "come from and, as one file, may lack its own: a checkpoint, a model's folder, or one file of its weights",
    )
    parser.add_argument("--vae", type=Path, metavar="DIR", help="the autoencoder in place of CHECKPOINT's, or of none")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA to fuse into the denoiser and the text encoders, times SCALE (default: 1): a .safetensors file in "
        "kohya's or diffusers' layout, or a folder of peft's; may be given several times; further denoisers keep their "
        "weights",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read .bin weights where there is no safetensors file; unpickling can run code, so only for files of "
        "people you trust, though torch's restricted unpickler is used",
    )
    parser.add_argument(
        "--verify-against",
        type=Path,
        metavar="SOURCE",
        help="the checkpoint that optimum's graphs in CHECKPOINT came from: they are compared with it, else run once",
    )


def _add_preset(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset", metavar="NAME", help=f"export this architecture instead of CHECKPOINT: {', '.join(preset_names())}"
    )
    group.add_argument(
        "--scale",
        choices=SCALES,
        help="full: true size (default); tiny: an eighth of all widths and sides, same topology",
    )


def _add_defaults(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--solver", metavar="NAME", help="as in `tandemrt generate`, such as tcd; CHECKPOINT's scheduler by default"
    )
    group.add_argument(
        "--solver-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the scheduler's configuration with a JSON value; may be given several times",
    )
    group.add_argument("--timesteps", metavar="T,T,...", help="explicit training time steps, falling")
    group.add_argument("--eta", type=float, metavar="X", help="DDIM's eta, TCD's gamma; 0 by default")
    group.add_argument("--guidance-scale", type=float, metavar="F", help="the bundle's default guidance scale")
    group.add_argument(
        "--num-inference-steps", "--denoising-steps", type=int, metavar="N", help="the bundle's default number of steps"
    )


def plan_from_arguments(args: argparse.Namespace) -> ExportPlan | PresetPlan:
    """The plan that the arguments describe.

    Raises:
        ArgumentError: a value that cannot be used, or both or neither of CHECKPOINT and `--preset`.
    """
    if args.preset is not None:
        return _preset_plan(args)
    if args.checkpoint is None:
        raise ArgumentError("CHECKPOINT", "not given", expected="CHECKPOINT OUT, or OUT --preset NAME")
    if args.scale is not None:
        raise ArgumentError("--scale", "is of presets only", got=args.scale, expected="--preset NAME beside it")
    return ExportPlan(
        checkpoint=args.checkpoint,
        out=args.out,
        added=tuple(Added(*source) for source in parse_sources(args.small, args.tiny_vae, args.add).items()),
        tokenizer=args.tokenizer,
        denoiser=args.denoiser,
        vae=args.vae,
        loras=tuple(map(parse_lora, args.lora)),
        dtype=args.dtype,
        solver=args.solver,
        solver_config=parse_settings("--solver-config", args.solver_config),
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        timesteps=None if args.timesteps is None else parse_timesteps(args.timesteps),
        eta=0.0 if args.eta is None else args.eta,
        force=args.force,
        allow_pickle=args.allow_pickle,
        verify_against=args.verify_against,
    )


def plan_facts(plan: ExportPlan | PresetPlan) -> dict[str, Any]:
    """What `--print-plan` shows; see `describe`."""
    if isinstance(plan, ExportPlan):
        return describe(plan)
    require_free(plan.out, force=plan.force)
    preset = read_preset(plan.name)
    parts = {**preset.models, **preset.added}
    return {
        **plan.as_json(),
        "published_as": list(preset.published_as),
        "models": {
            part: {"name": name, "parameters_at_full_scale": models()[name].parameters} for part, name in parts.items()
        },
    }


def run(plan: ExportPlan | PresetPlan, reporter: Reporter) -> dict[str, Any]:
    """Do what the plan says; the result is in JSON's types.

    Raises:
        CheckpointError, ExportError: see `export_bundle`.
    """
    from ..runtime.manifest_files import MANIFEST_NAME, decode  # noqa: PLC0415

    if isinstance(plan, ExportPlan) and plan.allow_pickle:
        reporter.warn(PICKLE_WARNING)
    plan_facts(plan)  # refuses what can be refused before torch is imported, which takes seconds
    from .bundle import export_bundle, export_preset  # noqa: PLC0415

    export = export_bundle if isinstance(plan, ExportPlan) else export_preset
    out = export(plan, reporter.progress)  # type: ignore[arg-type]
    manifest = decode((out / MANIFEST_NAME).read_bytes(), str(out / MANIFEST_NAME))
    return {
        "bundle": str(out),
        "bytes": sum(record.size for record in manifest.files.values()),
        "components": {
            name: {
                "parameters": component.parameters,
                "precision": component.precision,
                "fp32_islands": len(component.fp32_islands),
                "max_relative_error": max((each.value for each in component.evidence), default=None),
                "threshold": component.evidence[0].threshold if component.evidence else None,
            }
            for name, component in manifest.components.items()
        },
    }


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """The bundle and how close to PyTorch its components are, as lines of text."""
    yield f"{result['bundle']}: {result['bytes'] / 1e6:.1f} MB"
    for name, component in result["components"].items():
        islands = f", {component['fp32_islands']} fp32 islands" if component["fp32_islands"] else ""
        if component["threshold"] is None:
            verdict = "not compared with PyTorch"
        else:
            error = component["max_relative_error"]
            verdict = f"max_relative_error {error:.2g} (at most {component['threshold']:g})"
        yield f"  {name}: {component['parameters']:,} parameters, {component['precision']}{islands}, {verdict}"


def _preset_plan(args: argparse.Namespace) -> PresetPlan:
    sources = parse_sources(args.small, args.tiny_vae, args.add)
    given = {
        "CHECKPOINT": args.checkpoint,
        "--tokenizer": args.tokenizer,
        "--denoiser": args.denoiser,
        "--vae": args.vae,
        "--verify-against": args.verify_against,
        "--lora": args.lora or None,
        "--allow-pickle": args.allow_pickle or None,
        "--solver": args.solver,
        "--solver-config": args.solver_config or None,
        "--timesteps": args.timesteps,
        "--eta": args.eta,
        **sources,
    }
    for name, value in given.items():
        if value is not None:
            what = "given beside --preset, which names every model and the scheduler"
            raise ArgumentError(name, what, got=str(value))
    return PresetPlan(
        name=args.preset,
        out=args.out,
        scale=args.scale or "full",
        dtype=args.dtype,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        force=args.force,
    )
