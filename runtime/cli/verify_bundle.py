"""`tandemrt verify`: whether a bundle still is what was exported, and, given its sources, what PyTorch computes."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..arguments import did_you_mean
from ..bundle import Bundle
from ..errors import ArgumentError, BundleError
from ..manifest import Evidence
from . import verify_layers
from .columns import aligned
from .inspect_bundle import size_text
from .reporter import Reporter
from .values import SHORT_FOR, parse_sources
from .verify_layers import LayersPlan

DIGESTS = "the folder holds the files of the manifest and no others, each of its size and sha256"

EPILOG = """\
examples:
  tandemrt verify bundle/
  tandemrt verify bundle/ --checkpoint stable-diffusion-v1-5/ --small small-sd/ --lora style.safetensors:0.6
  tandemrt verify bundle/ --layers --target openvino:cpu:bf16 --component unet
"""


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """What to check.

    checkpoint: what the bundle was exported from, where that is to be compared. added: further sources by component.
    tokenizer, denoiser, vae, loras (FILE:SCALE), allow_pickle: as they were given to the export.
    layers: what to compare layer by layer instead.
    """

    bundle: Path
    checkpoint: Path | None
    added: Mapping[str, Path]
    tokenizer: Path | None = None
    denoiser: Path | None = None
    vae: Path | None = None
    loras: tuple[str, ...] = ()
    allow_pickle: bool = False
    layers: LayersPlan | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check that a bundle is complete and unchanged: every file's size and sha256 against the manifest. With "
        "--checkpoint, also run every component whose source is given in ONNX Runtime and in PyTorch and compare them, "
        'as the export did; this needs pip install "tandemrt[export,cpu]". A digest proves integrity, not authorship.'
    )
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    group = parser.add_argument_group("sources, as they were given to `tandemrt export`")
    group.add_argument("--checkpoint", type=Path, metavar="SOURCE", help="the checkpoint the bundle was exported from")
    group.add_argument("--small", type=Path, metavar="DIR", help="what unet_small was exported from")
    group.add_argument("--tiny-vae", type=Path, metavar="DIR", help="what vae_decoder_tiny was exported from")
    group.add_argument(
        "--add", action="append", default=[], metavar="NAME=DIR", help="what another component was exported from"
    )
    group.add_argument("--tokenizer", type=Path, metavar="DIR", help="the tokenizer of a checkpoint in one file")
    group.add_argument("--denoiser", type=Path, metavar="SOURCE", help="the denoiser in place of the checkpoint's")
    group.add_argument("--vae", type=Path, metavar="DIR", help="the autoencoder in place of the checkpoint's")
    group.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="a LoRA that was fused, in the same order"
    )
    group.add_argument("--allow-pickle", action="store_true", help="read .bin weights where there are no others")
    verify_layers.add_arguments(parser)


def plan_from_arguments(namespace: argparse.Namespace) -> VerifyPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: a source that is not NAME=DIR, is given twice, or comes without the main checkpoint.
    """
    added = parse_sources(namespace.small, namespace.tiny_vae, namespace.add)
    others = namespace.tokenizer or namespace.denoiser or namespace.vae or namespace.lora
    if (added or others) and namespace.checkpoint is None:
        remedy = "Give --checkpoint as well: its text encoder and VAE make the inputs of the comparison."
        raise ArgumentError("--checkpoint", "not given beside other sources", remedy=remedy)
    layers = verify_layers.plan_from_arguments(namespace)
    if layers is not None and namespace.checkpoint is not None:
        raise ArgumentError("--layers", "given beside --checkpoint", remedy="Run the two one after the other.")
    return VerifyPlan(
        namespace.bundle,
        namespace.checkpoint,
        added,
        layers=layers,
        tokenizer=namespace.tokenizer,
        denoiser=namespace.denoiser,
        vae=namespace.vae,
        loras=tuple(namespace.lora),
        allow_pickle=namespace.allow_pickle,
    )


def run(plan: VerifyPlan, reporter: Reporter) -> dict[str, Any]:
    """What was checked and what was not.

    Raises:
        BundleError: the bundle is damaged, or a component is farther from PyTorch than its threshold.
        ArgumentError: a source is given for a component the bundle has not.
        CheckpointError: a source is not what the component was exported from.
        TandemError: see `verify_layers.run`.
    """
    bundle = Bundle.open(plan.bundle)
    if plan.layers is not None:
        return verify_layers.run(plan.layers, bundle, reporter)
    components = bundle.manifest.components
    unknown = [name for name in plan.added if name not in components]
    if unknown:
        option = f"{SHORT_FOR[unknown[0]]} or --add" if unknown[0] in SHORT_FOR else "--add"
        expected, remedy = f"one of {', '.join(components)}", did_you_mean(unknown[0], components)
        raise ArgumentError(option, "no such component", got=unknown[0], expected=expected, remedy=remedy)
    parity: Mapping[str, Sequence[Evidence]] = {}
    if plan.checkpoint is not None:
        verify_bundle = importlib.import_module("tandemrt.export.verify").verify_bundle
        parity = verify_bundle(bundle, _export_plan(plan), reporter.progress)
        _require_close(parity, bundle.path)
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "files": len(bundle.manifest.files),
        "size_bytes": sum(record.size for record in bundle.manifest.files.values()),
        "digests": DIGESTS,
        "parity": {name: msgspec.to_builtins(list(evidence)) for name, evidence in parity.items()},
        "parity_not_checked": [
            name for name, one in components.items() if name not in parity and one.quantization is None
        ],
        "quantized": [name for name, one in components.items() if one.quantization is not None],
    }


def status(result: Mapping[str, Any]) -> int:
    """The exit status of a comparison that could be made: 1 where a layer diverges."""
    return int(any(one["diverges"] for one in result.get("layers", ())))


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    if "layers" in result:
        yield from verify_layers.summary(result)
        return
    yield f"{result['path']}: {result['files']} files, {size_text(result['size_bytes'])}, digest {result['digest']}"
    yield f"checked: {result['digests']}"
    if result["parity"]:
        yield "checked: the difference from PyTorch, worst of every component"
        rows = ((name, _worst(evidence)) for name, evidence in result["parity"].items())
        yield from aligned(
            [
                (name, worst["metric"], f"{worst['value']:.2g}", f"at most {worst['threshold']:g}")
                for name, worst in rows
            ],
            indent="  ",
        )
    if result["parity_not_checked"]:
        names = ", ".join(result["parity_not_checked"])
        option = "--small, --tiny-vae or --add NAME=DIR" if result["parity"] else "--checkpoint DIR"
        yield f"not checked: the difference from PyTorch of {names}; give {option}"
    if result["quantized"]:
        names = ", ".join(result["quantized"])
        yield f"not compared with PyTorch: {names}, which is quantized; `tandemrt inspect` tells what that took"


def _export_plan(plan: VerifyPlan) -> Any:
    """The export that the bundle should be of."""
    plans = importlib.import_module("tandemrt.export.plan")
    return plans.ExportPlan(
        checkpoint=plan.checkpoint,
        out=plan.bundle,
        added=tuple(plans.Added(*each) for each in plan.added.items()),
        tokenizer=plan.tokenizer,
        denoiser=plan.denoiser,
        vae=plan.vae,
        loras=tuple(map(plans.parse_lora, plan.loras)),
        allow_pickle=plan.allow_pickle,
    )


def _require_close(parity: Mapping[str, Sequence[Evidence]], path: Path) -> None:
    for name, evidence in parity.items():
        for comparison in evidence:
            if not comparison.holds:
                raise BundleError(
                    f"{path}: {name}",
                    f"{comparison.metric} to PyTorch at {comparison.input_shapes}",
                    got=comparison.value,
                    expected=f"at most {comparison.threshold:g}",
                    remedy="Export the bundle again; if that passes, this machine's onnxruntime computes otherwise.",
                )


def _worst(evidence: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(evidence, key=lambda comparison: float(comparison["value"]))
