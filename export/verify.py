"""A bundle on disk compared with the checkpoints it was exported from, as the export did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..runtime.bundle import Bundle
from ..runtime.errors import CheckpointError
from ..runtime.manifest import Evidence
from .jobs import Job, jobs, require_weights, samples
from .parity import compare
from .plan import ExportPlan, Progress, no_progress
from .sources import Sources, read_sources


def verify_bundle(bundle: Bundle, plan: ExportPlan, progress: Progress = no_progress) -> dict[str, Sequence[Evidence]]:
    """Run the components whose sources are given in ONNX Runtime and in PyTorch on the export's sample inputs.

    plan: the sources, as the export was given them; the rest of it is not read.

    Returns the figures by component; whether they are within their thresholds is for the caller to judge.

    Raises:
        CheckpointError: a source is no checkpoint, or not the one that its component was exported from.
        ExportError: ONNX Runtime cannot run a component.
    """
    found = read_sources(_as_exported(plan, bundle))
    components = bundle.manifest.components
    # Of what is quantized the manifest says what that took; the export's thresholds are not for it.
    wanted = [job for job in jobs(found) if job.name in components and components[job.name].quantization is None]
    for job in wanted:
        require_weights(job)
        _require_source(job, found, bundle)
    inputs = samples(found, bundle.path, bundle.manifest.text)
    results: dict[str, Sequence[Evidence]] = {}
    for done, job in enumerate(wanted):
        progress(f"{job.name}: verify", done, len(wanted))
        component, graph = bundle.component(job.name), job.graph()
        model, cases = bundle.path / component.model, inputs.cases(job.name, graph)
        comparisons = compare(job.name, graph, model, cases, component.precision)
        results[job.name] = tuple(each.evidence for each in comparisons)
    progress("verify", len(wanted), len(wanted))
    return results


def _as_exported(plan: ExportPlan, bundle: Bundle) -> ExportPlan:
    """The plan with what one file of weights does not say of its denoiser and the bundle does."""
    kinds = (each.prediction_type for each in bundle.manifest.components.values() if each.role == "denoiser")
    kind = next(kinds, None)
    if not plan.checkpoint.is_file() or kind in (None, "flow"):
        return plan
    return replace(plan, solver_config={"prediction_type": kind})


def _require_source(job: Job, sources: Sources, bundle: Bundle) -> None:
    digest, expected = sources.digest(job.part), bundle.component(job.name).source.sha256
    if digest != expected:
        raise CheckpointError(
            f"{job.name}: {job.part.folder}",
            "not what the component was exported from; sha256 of config, weights and LoRAs",
            got=digest,
            expected=expected,
            remedy="Give what the bundle was exported from, with its LoRAs and their scales if it had any.",
        )
