"""The options of `tandemrt generate`, group by group."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..plan import GUIDANCES, PLACEMENTS
from ..solvers import SOLVERS

ORDINALS = {"2": "second", "3": "third"}
FURTHER_PROMPTS = tuple(f"{branch}prompt_{number}" for number in ORDINALS for branch in ("", "negative_"))


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Add all options to a parser."""
    _add_what(parser.add_argument_group("what to paint"))
    _add_from(parser.add_argument_group("what to paint it from"))
    _add_how(parser.add_argument_group("how to paint it"))
    _add_guidance(parser.add_argument_group("how closely to keep to the prompt"))
    _add_where(parser.add_argument_group("where to run, where to write"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to paint; may be repeated")
    group.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line, UTF-8; blank lines are skipped"
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from, for every prompt")
    for name in FURTHER_PROMPTS:
        which = f"{ORDINALS[name[-1]]} text encoder, where the bundle has one"
        text = "what it steers away from" if name.startswith("negative") else "what it reads instead of each prompt"
        group.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=f"for the {which}: {text}")
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="where the noise comes from, the same for every prompt; random by default",
    )
    group.add_argument(
        "--seed-device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="whose noise: that of torch.Generator on the CPU (default) or on CUDA",
    )
    group.add_argument(
        "--num-images-per-prompt",
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="pictures for each prompt, painted together; they use seed, seed+1, seed+2 ... (default 1)",
    )
    group.add_argument(
        "--size",
        metavar="PIXELS",
        help="512 for a square, 768x512 for width x height; in multiples of 64 for most UNets",
    )
    group.add_argument("--width", type=int, metavar="PIXELS", help="instead of --size")
    group.add_argument("--height", type=int, metavar="PIXELS", help="instead of --size")


def _add_from(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="start from this picture; its size is used unless another is given, to which it is then resized",
    )
    group.add_argument(
        "--mask", type=Path, metavar="FILE", help="paint only where this picture is white, and keep the rest of --image"
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="how much of --image is painted anew, above 0 and up to 1: the last part of the steps (default 0.8; 1 "
        "with --mask)",
    )
    group.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="steer by this picture with the bundle's ControlNet of that name; may be repeated. FILE alone where there "
        "is one ControlNet",
    )
    group.add_argument(
        "--control-scale",
        action="append",
        default=[],
        metavar="X",
        help="how strongly ControlNets steer (default 1), or NAME=X, which may be repeated",
    )
    group.add_argument(
        "--control-interval",
        action="append",
        default=[],
        metavar="START,END",
        help="the part of the rows (model calls) in which they do, as fractions (default 0,1), or NAME=START,END",
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps",
        metavar="STEPS",
        help="25: all on the first denoiser; 10,15: ten on the first, fifteen on the second; or by name: "
        "unet:10,unet_small:15, run in the order given. A name may come back, as in unet:5,unet_small:15,unet:5; the "
        "numbers of one that follow each other add up. `tandemrt inspect` lists the denoisers",
    )
    group.add_argument(
        "--num-inference-steps",
        "--denoising-steps",
        type=int,
        metavar="N",
        help="a number of steps on the first denoiser, as in diffusers",
    )
    group.add_argument(
        "--solver",
        metavar="NAME",
        help=f"{', '.join(SOLVERS)}, or a diffusers scheduler class; the bundle's scheduler by default",
    )
    group.add_argument(
        "--solver-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of diffusers' scheduler configuration with a JSON value, such as use_karras_sigmas=true; "
        "may be repeated",
    )
    group.add_argument("--timesteps", metavar="T,T,...", help="explicit training time steps, falling")
    group.add_argument(
        "--eta", type=float, metavar="X", help="fresh noise in each step: DDIM's eta, TCD's gamma; the bundle's default"
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA, times SCALE (default 1): a .safetensors file or a folder of peft's; may be repeated. Needs "
        "engines of `tandemrt build-engine --lora-slots N --lora-rank R`; `tandemrt export --lora` fuses one instead",
    )
    group.add_argument("--decoder", metavar="NAME", help="which of the bundle's decoders paints; its first by default")
    group.add_argument(
        "--strict-prompts", action="store_true", help="refuse prompts that are too long, do not cut them"
    )


def _add_guidance(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--guidance-scale", type=float, metavar="X", help="how strongly the prompt counts; 1 is off")
    group.add_argument(
        "--guidance-interval",
        metavar="START,END",
        help="the part of the steps with guidance, as fractions: 0.0,0.8 leaves it off for the last fifth (default: "
        "the bundle's, else 0,1)",
    )
    group.add_argument(
        "--guidance",
        choices=GUIDANCES,
        default="fixed",
        help="adaptive: within the interval, leave out the branch without the prompt where both branches agree",
    )
    group.add_argument(
        "--guidance-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="when they do: threshold, release, probe, steady (see docs/tandem.md); may be repeated",
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="batched",
        help="where the two branches run: in one call (batched, the default), one after the other (sequential), which "
        "takes less memory, both at once (parallel), or as is fastest here, which is tried once (auto); the picture is "
        "the same. hybridiff: in parallel but for a window in which stages of the denoiser run at once, see "
        "docs/tandem.md; the picture is close",
    )
    group.add_argument(
        "--placement-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of hybridiff: L_slope, eps_slope, k, tau_cap, model_n, stride, time_shift; may be repeated",
    )


def _add_where(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target",
        default="auto",
        metavar="TARGET",
        help="backend, device and precision such as onnxruntime:cpu:fp32; `tandemrt doctor` lists them (default auto)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads a model may use")
    group.add_argument(
        "--devices",
        metavar="N,N",
        help="GPUs for a flavour of TensorRT, as `tandemrt doctor` counts them (default 0); on the second of two the "
        "branch without the prompt runs, with --placement parallel, hybridiff or auto",
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where engines are that `tandemrt build-engine` made (default: $TANDEMRT_CACHE, else tandemrt/ in "
        "$XDG_CACHE_HOME or ~/.cache)",
    )
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("out"),
        metavar="DIR",
        help="where the pictures go, named NUMBER-seedSEED-PROMPT.png (default out)",
    )
    group.add_argument("--force", action="store_true", help="replace pictures that are already there")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a timeline of the run, which ui.perfetto.dev shows"
    )
    group.add_argument(
        "--previews", type=int, default=0, metavar="N", help="write a preview every N rows into DIR/previews"
    )
