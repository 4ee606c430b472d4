"""`tandemrt verify --layers`: where a target departs from what a bundle's graphs mean, told node by node."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..bundle import Bundle
from ..errors import ArgumentError
from ..targets import Target, parse_target
from .columns import aligned
from .reporter import Reporter
from .values import parse_size


@dataclass(frozen=True, slots=True)
class LayersPlan:
    """What to compare with ONNX Runtime in float32; all components where none is named.

    size: (width, height) in pixels of the picture that the inputs come from; None for the bundle's default.
    extract: where the smallest part of the graph goes that is off by itself, of one component on one target.
    """

    targets: tuple[Target, ...]
    components: tuple[str, ...]
    size: tuple[int, int] | None
    extract: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "layer by layer",
        'what a target computes against ONNX Runtime in float32, value by value; needs pip install "tandemrt[engines,'
        'cpu]". Exit status 1 says that something diverges.',
    )
    group.add_argument("--layers", action="store_true", help="find the first node whose result is off on a target")
    group.add_argument(
        "--target", action="append", default=[], metavar="TARGET",
        help="BACKEND:DEVICE[:PRECISION], such as openvino:cpu:bf16; may be given several times"
    )  # fmt: skip
    group.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="a component to compare (default: all)"
    )
    group.add_argument(
        "--size", metavar="WxH", help="of the picture whose generation gives the inputs (default: the bundle's)"
    )
    group.add_argument(
        "--extract", type=Path, metavar="FILE.onnx",
        help="write the smallest part of the graph that makes the first value over the bound wrongly by itself, its "
        "inputs beside it, for a bug report; with one --target and one --component"
    )  # fmt: skip


def plan_from_arguments(namespace: argparse.Namespace) -> LayersPlan | None:
    """The plan that the arguments describe, None where layers are not to be compared.

    Raises:
        ArgumentError: an option of this comparison without --layers, or --layers without a target.
    """
    given = {"--target": namespace.target, "--component": namespace.component, "--size": namespace.size}
    given["--extract"] = namespace.extract
    if not namespace.layers:
        stray = next((option for option, value in given.items() if value), None)
        if stray is not None:
            raise ArgumentError(stray, "given without --layers", remedy="Give both.")
        return None
    if not namespace.target:
        raise ArgumentError("--layers", "needs --target TARGET", remedy="Such as --target openvino:cpu:bf16.")
    if namespace.extract is not None and (len(namespace.target), len(namespace.component)) != (1, 1):
        raise ArgumentError("--extract", "needs one --target and one --component")
    size = None if namespace.size is None else parse_size(namespace.size)
    targets = tuple(map(parse_target, namespace.target))
    return LayersPlan(targets, tuple(namespace.component), size, namespace.extract)


def run(plan: LayersPlan, bundle: Bundle, reporter: Reporter) -> dict[str, Any]:
    """The comparisons, in the order of targets and components.

    Raises:
        ArgumentError: the bundle has no such component.
        TargetError: a target cannot run here, or not the bundle.
        TandemError: a component cannot be run.
    """
    names = plan.components or tuple(bundle.manifest.components)
    bundle.require_components("--component", names)
    compare = importlib.import_module("tandemrt.engines.layers").compare_layers
    reports = (
        compare(bundle, name, target, plan.size, reporter.progress, plan.extract)
        for target in plan.targets
        for name in names
    )
    extract = None if plan.extract is None else str(plan.extract)
    compared = [{**msgspec.to_builtins(report), "diverges": report.diverges, "extract": extract} for report in reports]
    return {"path": str(bundle.path), "digest": bundle.digest, "layers": compared}


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    for one in result["layers"]:
        yield from _lines(one)


def _lines(one: Mapping[str, Any]) -> Iterator[str]:
    title = f"{one['component']} on {one['target']}"
    ran = f"engine {one['engine']}" if one["engine"] else "the bundle's graph"
    bound = f"{one['precision']} may be off by {one['threshold']:g}"
    yield f"{title}, {ran}: {one['compared']} values compared, {bound}"
    yield from aligned([("  output", difference["tensor"], _error(difference)) for difference in one["outputs"]])
    first = one["first"]
    if first is not None:
        yield f"  first over it: {first['node']} ({first['op']}), {first['tensor']} {_shape(first)}: {_error(first)}"
    elif one["diverges"]:
        yield "  no value in between is over it: read one by one, none is fused, so look at what the target fuses"
    part = one["part"]
    if first is None and one["extract"] is not None:
        yield f"  {one['extract']} was not written: there is no value in between that is over it"
    if part is not None:
        nodes = "1 node" if part["nodes"] == 1 else f"{part['nodes']} nodes"
        yield f"  by itself {nodes} that make it, given the reference's values, are off by {_error(part)}:"
        yield f"    polygraphy run {part['graph']} --onnxrt --load-inputs {part['inputs']}"
    if one["worst"]:
        yield "  worst:"
        rows = ((each["node"], each["op"], _shape(each), _error(each)) for each in one["worst"])
        yield from aligned(rows, indent="    ")


def _shape(difference: Mapping[str, Any]) -> str:
    return f"({', '.join(map(str, difference['shape']))})"


def _error(difference: Mapping[str, Any]) -> str:
    error = difference["relative_error"]
    return "NaN or Inf" if error is None else f"{error:.2g}"
