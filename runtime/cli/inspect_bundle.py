"""`tandemrt inspect`: what a bundle holds, without running it."""

from __future__ import annotations

import argparse
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..bundle import Bundle
from ..cache import cache_folder
from ..errors import ArgumentError
from ..manifest import Component, Evidence, Manifest
from ..solvers.config import KEYS
from .columns import aligned
from .inspect_engines import engine_facts, engine_lines
from .reporter import Reporter

_OTHER_MODELS = "; measured with other models than these"
EPILOG = """\
examples:
  tandemrt inspect bundle/
  tandemrt inspect bundle/ --engines
"""


@dataclass(frozen=True, slots=True)
class InspectPlan:
    """engines: the cache whose engines of the bundle are shown beside it, None for none."""

    bundle: Path
    engines: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what a bundle holds: its models with their precision, size, shapes and how close to PyTorch they were "
        "found at export, its latent space, text conditioning, scheduler and defaults. Every file's digest is checked "
        "on the way. No model is loaded, so no backend is needed."
    )
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder that `tandemrt export` made")
    parser.add_argument("--engines", action="store_true", help="show the engines built of it as well")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where they are; as in `tandemrt build-engine`")


def plan_from_arguments(namespace: argparse.Namespace) -> InspectPlan:
    if namespace.cache is not None and not namespace.engines:
        raise ArgumentError("--cache", "is of engines only", got=str(namespace.cache), expected="--engines beside it")
    return InspectPlan(namespace.bundle, cache_folder(namespace.cache) if namespace.engines else None)


def status(result: Mapping[str, Any]) -> int:
    """The exit status: 1 where an engine is damaged or cannot be read."""
    return int(any("error" in one or one["damage"] is not None for one in result.get("engines", ())))


def run(plan: InspectPlan, reporter: Reporter) -> dict[str, Any]:
    """The manifest's facts with what follows from them.

    Raises:
        BundleError: the bundle is damaged, foreign or newer than this runtime.
        EngineError: the cache belongs to another user, or everybody may write to it.
    """
    bundle = Bundle.open(plan.bundle)
    manifest = bundle.manifest
    facts: dict[str, Any] = msgspec.to_builtins(manifest)
    del facts["files"]
    components = {
        name: {**facts["components"][name], **_derived(component, manifest)}
        for name, component in manifest.components.items()
    }
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "files": len(manifest.files),
        "files_digest": manifest.files_digest,
        "outdated": list(manifest.calibrations.outdated(manifest.files_digest)),
        "size_bytes": sum(record.size for record in manifest.files.values()),
        **facts,
        "components": components,
        **({} if plan.engines is None else {"engines": engine_facts(bundle, plan.engines)}),
    }


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    latent, text, defaults = result["latent"], result["text"], result["defaults"]
    producers = ", ".join(f"{name} {version}" for name, version in result["producers"].items())
    yield f"{result['path']}: bundle of format {result['format']}"
    yield from aligned(
        [
            ("digest", result["digest"]),
            ("made with", producers),
            ("size", f"{size_text(result['size_bytes'])} in {result['files']} files, beside the manifest"),
            ("latent", f"{latent['channels']} channels, 1/{latent['downsampling']} of the picture's size, "
             f"scaling factor {latent['scaling_factor']:g}, shift {latent['shift_factor']:g}"),
            ("text", "; ".join(_encodings(text))),
            ("scheduler", _scheduler(result["scheduler"])),
            ("defaults", f"{defaults['width']}x{defaults['height']} pixels, {_steps(defaults)}, "
             f"guidance scale {defaults['guidance_scale']:g}{_distilled(defaults)}"),
            *(("guidance", told) for told in _guidance(defaults)),
            *_calibrated(result, defaults["steps"]),
        ],
        indent="  ",
    )  # fmt: skip
    yield ""
    yield from aligned(_component_table(result["components"]))
    yield ""
    yield from aligned(_tensor_table(result["components"]))
    for name, component in result["components"].items():
        if component["quantization"] is not None:
            yield ""
            yield f"{name} is quantized: {_quantized(component['quantization'])}"
            if component["quantization"]["kept"]:
                yield f"{name} keeps in floating point: {', '.join(component['quantization']['kept'])}"
        if component["scheduler"] is not None:
            yield ""
            yield f"{name} brings its own scheduler: {_scheduler(component['scheduler'])}"
    if "engines" in result:
        yield ""
        yield from engine_lines(result["engines"])


def _encodings(text: Mapping[str, Any]) -> Iterator[str]:
    for name, encoder in text["encoders"].items():
        pooled = f" and {encoder['pooled']}" if encoder["pooled"] else ""
        yield f"{name}: {encoder['max_length']} tokens of width {encoder['width']}, {encoder['hidden_state']}{pooled}"
    if text["zero_tokens"]:
        yield f"zeros for {text['zero_tokens']} tokens of an encoder that was left out"
    if text["zero_negative"]:
        yield "zeros where there is no negative prompt"


def _steps(defaults: Mapping[str, Any]) -> str:
    """How many steps, and whose they are where a calibration has divided them."""
    shared = defaults["steps"]
    return _shared(shared) if shared else f"{defaults['num_inference_steps']} steps"


def _shared(steps: Sequence[tuple[str, int]]) -> str:
    return f"{sum(count for _, count in steps)} steps ({', '.join(f'{name} {count}' for name, count in steps)})"


def _calibrated(result: Mapping[str, Any], steps: Any) -> Iterator[tuple[str, str]]:
    """What was measured for the defaults, a row each."""
    split, outdated = result["calibrations"]["split"], result["outdated"]
    if split is not None:
        chosen = next((point for point in split["points"] if point["steps"] == steps), None)
        cost = "" if chosen is None else f"; the default costs {cost_text(chosen)} of {split['large']} alone"
        told = f"of {len(split['points'])} plans, {split['prompts']} prompts, on {_where(split)}{cost}"
        if split["held_out"] is not None:
            told += f"; {split_held_out(split['held_out'])}"
        yield "split", told + _OTHER_MODELS * ("split" in outdated)
    for name, one in result["calibrations"]["guidance"].items():
        saved = 1 - one["branches"] / one["full_branches"]
        told = f"{saved:.1%} of the branches' runs saved at {one['psnr_db']:.1f} dB to full guidance"
        told += f", {one['held_out']} held-out prompts, for {_shared(one['steps'])}, guidance scale "
        told += f"{one['guidance_scale']:g}, on {_where(one)}"
        yield name, told + _OTHER_MODELS * (name in outdated)


def cost_text(point: Mapping[str, Any]) -> str:
    """What a plan costs with the interval of that, where there is one; `point` is a `SplitPoint` as JSON has it."""
    low, high = point["cost_interval"] or (0, 0)
    return f"{point['cost']:.3f}" + (f" ({low:.3f}–{high:.3f})" if low < high else "")


def split_held_out(one: Mapping[str, Any]) -> str:
    """What a split came to on prompts that it was not chosen with."""
    chosen, large, count = one["chosen"], one["large"], one["prompts"]
    told = f"on {count} held-out prompts latent error {chosen['latent_error']:.4f}, {chosen['psnr_db']:.1f} dB"
    right = "" if chosen["right"] is None else f", {chosen['right']} right ({large['right']} by the large one alone)"
    return told + right


def _where(measured: Mapping[str, Any]) -> str:
    """The target that something was measured on, and how many threads, where that was said."""
    threads = measured["threads"]
    return str(measured["target"]) + ("" if threads is None else f", {threads} thread{'s' * (threads != 1)}")


def _distilled(defaults: Mapping[str, Any]) -> str:
    """What its own scheduler was distilled for."""
    timesteps = f", time steps {', '.join(map(str, defaults['timesteps']))}" if defaults["timesteps"] else ""
    return timesteps + (f", eta {defaults['eta']:g}" if defaults["eta"] else "")


def _guidance(defaults: Mapping[str, Any]) -> Iterator[str]:
    """What `tandemrt calibrate guidance` stored."""
    told = []
    if defaults["guidance_interval"] is not None:
        start, end = defaults["guidance_interval"]
        told.append(f"in the part {start:g} to {end:g} of the steps")
    for name, numbers in (("adaptive", defaults["adaptive"]), ("hybridiff", defaults["taus"])):
        if numbers is not None:
            told.append(f"{name} {', '.join(f'{key} {value:g}' for key, value in numbers.items())}")
    if told:
        yield "; ".join(told)


def size_text(size_bytes: int) -> str:
    """A size in kB, MB or GB, powers of ten."""
    unit, divisor = next(
        (unit, divisor)
        for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
        if size_bytes >= divisor or unit == "kB"
    )
    return f"{size_bytes / divisor:.1f} {unit}"


def worst_evidence(component: Component) -> dict[str, Evidence]:
    """For each metric the comparison that came closest to its threshold."""
    worst: dict[str, Evidence] = {}
    for evidence in component.evidence:
        known = worst.get(evidence.metric)
        # Cross-multiplied, so that a threshold of 0 is no division by it.
        if known is None or evidence.value * known.threshold > known.value * evidence.threshold:
            worst[evidence.metric] = evidence
    return worst


def _derived(component: Component, manifest: Manifest) -> dict[str, Any]:
    folder = posixpath.dirname(component.model)
    sizes = (
        record.size
        for name, record in manifest.files.items()
        if name == component.model or (folder and posixpath.dirname(name) == folder)
    )
    worst = worst_evidence(component)
    return {
        "size_bytes": sum(sizes),
        "worst_evidence": {metric: msgspec.to_builtins(evidence) for metric, evidence in worst.items()},
    }


def _component_table(components: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield "component", "role", "precision", "parameters", "size", "verified against PyTorch"
    for name, component in components.items():
        islands = len(component["fp32_islands"])
        precision = component["precision"] + (f" ({islands} fp32 islands)" if islands else "")
        if component["quantization"] is not None:
            precision = f"{component['quantization']['format']}, the rest {precision}"
        parameters = f"{component['parameters']:,}"
        counts = Counter(evidence["metric"] for evidence in component["evidence"])
        evidence = "; ".join(
            f"{metric} {worst['value']:.2g}, at most {worst['threshold']:g}, worst of {counts[metric]}"
            for metric, worst in component["worst_evidence"].items()
        )
        size = size_text(component["size_bytes"])
        none = "no evidence" if component["quantization"] is None else "before it was quantized, below"
        yield name, component["role"], precision, parameters, size, evidence or none


def _quantized(quantization: Mapping[str, Any]) -> str:
    """What was quantized, by what, and what it took."""
    kept = f", {len(quantization['kept'])} kept in floating point" if quantization["kept"] else ""
    told = [f"{quantization['format']} in {quantization['layers']} layers{kept}"]
    told.append(f"{quantization['tool']} {quantization['version']}")
    told += map(loss_text, quantization["losses"])
    told += [] if quantization["speed"] is None else [speed_text(quantization["speed"])]
    return "; ".join(told)


def loss_text(loss: Mapping[str, Any]) -> str:
    """What quantization took in one way of painting, in words; `loss` is a `Loss` as JSON has it."""
    asked = "" if loss["min_psnr_db"] is None else f", at least {loss['min_psnr_db']:.4g} asked for"
    told = [f"{loss['psnr_db']:.1f} dB{asked} (worst {loss['worst_psnr_db']:.1f})"]
    told.append(f"SSIM {loss['ssim']:.4f}, latent error {loss['latent_error']:.2g}")
    if loss["accuracy"] is not None:
        asked = "" if loss["min_accuracy"] is None else f", at least {loss['min_accuracy']:.4g} of that asked for"
        told.append(f"{loss['accuracy']:.1%} right beside the float bundle's {loss['float_accuracy']:.1%}{asked}")
    prompts = f"{loss['prompts']} held-out prompts" if loss["held_out"] else "the empty prompt, as none were given"
    return f"{', '.join(told)}, {prompts}, {loss['painted']}"


def speed_text(speed: Mapping[str, Any]) -> str:
    """What a call takes beside the float component's, in words; `speed` is a `CallTime` as JSON has it."""
    spread = f"{speed['least_ratio']:.2f} to {speed['most_ratio']:.2f} in {speed['rounds']} rounds"
    slower = ""
    if speed["ratio"] > 1:
        slower = ": slower here" + ", but not in every round" * (speed["least_ratio"] <= 1)
    taken = f"{speed['quantized_ms']:.3g} ms beside {speed['float_ms']:.3g} ms in floating point"
    return f"a call takes {taken}, {speed['ratio']:.2f} times as long ({spread}){slower}; on {_where(speed)}"


def _tensor_table(components: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield "component", "", "tensor", "type", "shape"
    for name, component in components.items():
        for direction in ("inputs", "outputs"):
            for tensor in component[direction]:
                shape = "(" + ", ".join(str(size) for size in tensor["shape"]) + ")"
                yield name, direction.removesuffix("s"), tensor["name"], tensor["dtype"], shape


def _scheduler(scheduler: Mapping[str, Any]) -> str:
    """The class and the keys that are not as diffusers has them by default."""
    known = KEYS.get(scheduler["class_name"], {})
    told = ", ".join(
        f"{key}={value}"
        for key, value in scheduler["config"].items()
        if not key.startswith("_") and not (key in known and value == _from_json(known[key].default))
    )
    return f"{scheduler['class_name']} ({told or 'all defaults'})"


def _from_json(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
