"""`tandemrt calibrate quantize`: a bundle made of another one, with some components in eight or four bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.bundle import Bundle
from ..runtime.calibrations import CallTime
from ..runtime.cli.inspect_bundle import loss_text, size_text, speed_text
from ..runtime.cli.reporter import Reporter
from ..runtime.engine_files import weights_of
from ..runtime.errors import TandemError
from .cache_entries import sweep_unused
from .call_times import call_times
from .derived import Derived
from .judged import NO_PROMPTS
from .ledger import Ledger
from .quantize_arguments import QuantizePlan, add_arguments, plan_from_arguments
from .quantize_floor import floor_warnings
from .quantize_job import Job, job_of
from .quantize_search import Search
from .quantizers import layer_names

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "summary"]

_LEDGER = "found.jsonl"


def plan_facts(plan: QuantizePlan) -> dict[str, Any]:
    """What would be quantized and painted, JSON-able; no model is loaded.

    Raises:
        TandemError: as `run`, where it can be known beforehand.
    """
    job = job_of(plan)
    return {
        "bundle": {"path": str(job.bundle.path), "digest": job.bundle.digest},
        "out": str(plan.out),
        "format": plan.format,
        "components": {
            name: {
                "layers": len(layer_names(job.bundle.model_path(name), plan.format)),
                "kept": list(job.keep[name]),
                "samples": job.samples(name),
                "painted": list(map(str, job.ways[name])),
            }
            for name in job.names
        },
        "prompts": len(job.judged.prompts),
        "held_out": job.judged.prompts != NO_PROMPTS,
        "search_prompts": 0 if job.searched is None else len(job.searched.prompts),
        "target": plan.target,
        "budget": {"min_psnr_db": plan.budget.min_psnr_db, "min_accuracy": plan.budget.min_accuracy},
    }


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What would be quantized and painted, for a person."""
    yield f"{facts['bundle']['path']} in {facts['format']}, to {facts['out']}"
    for name, one in facts["components"].items():
        kept = f", {len(one['kept'])} of them kept" if one["kept"] else ""
        samples = "" if one["samples"] is None else f", {one['samples']} samples"
        yield f"{name}: {one['layers']} layers{kept}{samples}; painted with {'; '.join(one['painted'])}"
    if facts["search_prompts"]:
        yield f"layers to keep are searched for with {facts['search_prompts']} prompts"
    judged = f"{facts['prompts']} held-out prompts" if facts["held_out"] else "the empty prompt, as none are given,"
    yield f"judged by {judged} on {facts['target']}"


def run(plan: QuantizePlan, reporter: Reporter) -> dict[str, Any]:
    """Quantize, judge and publish.

    Raises:
        ArgumentError, CalibrationError, ExportError, BundleError: as `job_of`.
        CalibrationError: a budget that cannot be met, or another run that searches for the same.
        ExportError: the new bundle cannot be written.
        TandemError: the target cannot be used, or a model failed.
    """
    job = job_of(plan)
    sweep_unused(plan.cache, job.folder, *map(job.ranges, job.names))
    with ExitStack() as entered:
        ledger = None
        if plan.discard:
            job.forget_ranges()
        if plan.budget.asks:
            path = job.folder / _LEDGER
            ledger = entered.enter_context(Ledger(path, job.ground(), discard=plan.discard, option="--cache"))
            if len(ledger):
                reporter.note(f"goes on with {len(ledger)} things measured before; --discard measures them anew")
        derived = entered.enter_context(Derived(job.bundle, plan.out, force=plan.force))
        losses = Search(job, derived, ledger, reporter).settled()
        speeds = _speeds(job, derived.opened(), reporter)
        for name in job.names:
            derived.tell(name, [losses[way] for way in job.ways[name]], speeds.get(name))
        if not plan.budget.asks:
            for text in floor_warnings(job.ways, losses, held_out=job.judged.prompts != NO_PROMPTS):
                reporter.warn(text)
        return _told(job, derived.publish())


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What was made, for a person."""
    losses: dict[str, Mapping[str, Any]] = {}
    for name, one in result["components"].items():
        kept = f", {len(one['kept'])} kept in floating point" if one["kept"] else ""
        smaller = f"{size_text(one['size_bytes_before'])} to {size_text(one['size_bytes'])}"
        yield f"{name}: {one['layers']} layers in {result['format']}{kept}; {smaller}"
        if one["speed"] is not None:
            yield f"{name}: {speed_text(one['speed'])}"
        losses |= {loss["painted"]: loss for loss in one["losses"]}
    yield from map(loss_text, losses.values())
    yield f"{result['out']}: digest {result['digest']}"


def _speeds(job: Job, made: Bundle, reporter: Reporter) -> Mapping[str, CallTime]:
    """What can be said of calls' times: what was judged is published without them where they cannot be taken."""
    try:
        return call_times(job.bundle, made, job.ways, job.judged, reporter.progress)
    except TandemError as error:
        reporter.warn(f"calls were not timed: {error}")
        return {}


def _told(job: Job, made: Bundle) -> dict[str, Any]:
    """What was made, JSON-able."""
    components = {}
    for name in job.names:
        quantization = made.component(name).quantization
        components[name] = {
            **(msgspec.to_builtins(quantization) if quantization is not None else {}),
            "size_bytes_before": _size(job.bundle, name),
            "size_bytes": _size(made, name),
        }
    return {
        "bundle": {"path": str(job.bundle.path), "digest": job.bundle.digest},
        "out": str(made.path),
        "digest": made.digest,
        "format": job.plan.format,
        "components": components,
    }


def _size(bundle: Bundle, name: str) -> int:
    model = bundle.component(name).model
    folder = Path(model).parent
    files = {model, *((folder / file).as_posix() for file in weights_of(bundle, name))}
    return sum(bundle.manifest.files[file].size for file in files)
