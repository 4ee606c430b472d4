"""Exports a checkpoint: every part read, exported, compared with PyTorch, and published together as one bundle."""

from __future__ import annotations

import contextlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from onnxscript import ir

from ..runtime.errors import BundleError, ExportError
from ..runtime.manifest import FORMAT, Component, Defaults, Evidence, Manifest, Source
from ..runtime.manifest_files import MANIFEST_NAME, decode, encode, file_records, write
from ..runtime.staging import Staging, require_free, writing_failed
from .adopt import AdoptedGraph, require_plausible
from .agreement import latent_space, prediction_type
from .audit import find_islands
from .checkpoint import TOKENIZERS, TextSource, tokenizer_of
from .conditioning import text_conditioning, text_limits
from .graph import MODEL_NAME, onnx_from_module, save
from .half import half_from_float
from .jobs import Job, jobs, reference_of, references, samples
from .modules import Graph, Interface
from .parity import compare, require_close
from .plan import ExportPlan, PresetPlan, Progress, no_progress
from .presets import read_preset
from .random_checkpoint import write_checkpoint
from .samples import PROBE, Inputs, Samples
from .sources import Sources, read_sources
from .tokenizer import export_tokenizer

_PRODUCERS = ("tandemrt", "torch", "diffusers", "transformers", "onnx", "onnxscript")
# Distributions of one module, of which one is installed.
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_STEPS_PER_COMPONENT = 3
# What diffusers' pipelines want said of the parts that a bundle leaves out.
_NO_CHECKER = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def export_bundle(plan: ExportPlan, progress: Progress = no_progress) -> Path:
    """Export a checkpoint as a verified bundle and return the bundle's path.

    Raises:
        CheckpointError: a source is no checkpoint, is damaged, is of an unsupported kind, or does not fit the others.
        ExportError: torch could not export a part, a part missed its parity threshold, or the bundle cannot be written.
            Nothing was published; a bundle that was there is still there.
    """
    require_free(plan.out, force=plan.force)
    sources = read_sources(plan)
    if sources.assumption is not None:
        progress(sources.assumption, 0, 1)
    with Staging(plan.out, force=plan.force) as staging:
        try:
            manifest = _Export(plan, sources, staging.folder, progress).run()
            _require_readable(manifest)
            write(manifest, staging.folder)
        except OSError as error:
            raise writing_failed(staging.out, error) from error
        staging.publish()
    total = _STEPS_PER_COMPONENT * len(manifest.components) + 1
    progress("bundle: publish", total, total)
    return staging.out


def export_preset(plan: PresetPlan, progress: Progress = no_progress) -> Path:
    """Export an architecture with random weights, which are written beside `plan.out` for the while of the export.

    Raises:
        ExportError: as `export_bundle`.
    """
    # Never published: it only holds the checkpoint for as long as the export reads it.
    with Staging(plan.out, force=plan.force) as scratch:
        progress(f"{plan.name}: random weights", 0, 1)
        try:
            added = write_checkpoint(read_preset(plan.name), scratch.folder, plan.scale)
        except OSError as error:
            raise writing_failed(plan.out, error) from error
        return export_bundle(plan.export_plan(scratch.folder / "checkpoint", added), progress)


class _Export:
    """One run: what was learnt on the way from part to part."""

    def __init__(self, plan: ExportPlan, sources: Sources, folder: Path, progress: Progress) -> None:
        self._plan, self._sources, self._folder, self._progress = plan, sources, folder, progress
        self._producers = _installed_versions()
        self._jobs = tuple(jobs(sources))
        self._references = references(plan)
        self._done, self._total = 0, _STEPS_PER_COMPONENT * len(self._jobs) + 1

    def run(self) -> Manifest:
        """Write everything but the manifest to the folder."""
        main = self._sources.main
        lengths = {name: self._tokenizer(name, source) for name, source in main.texts.items()}
        text = text_conditioning(main, lengths)
        inputs = samples(self._sources, self._folder, text)
        components = {job.name: self._component(job, inputs) for job in self._jobs}
        self._step("bundle: publish")
        self._write_pipeline_files()
        return Manifest(
            format=FORMAT,
            producers=self._producers,
            components=components,
            files=file_records(self._folder),
            latent=latent_space(main.vae),
            text=text,
            scheduler=main.scheduler,
            defaults=self._defaults(),
        )

    def _tokenizer(self, name: str, source: TextSource) -> int:
        """Export a text encoder's tokenizer; returns the length prompts are padded to."""
        folder = self._folder / tokenizer_of(name)
        return export_tokenizer(source.tokenizer, folder, *text_limits(source.encoder))

    def _component(self, job: Job, inputs: Samples) -> Component:
        """Load, export and verify one model; only this one is in memory meanwhile."""
        self._step(f"{job.name}: load")
        graph = job.graph()
        cases = inputs.cases(job.name, graph)
        self._step(f"{job.name}: export {graph.parameters / 1e6:.1f} M parameters")
        folder = self._folder / job.name
        folder.mkdir()
        model = graph.model if isinstance(graph, AdoptedGraph) else onnx_from_module(job.name, graph)
        islands: tuple[str, ...] = ()
        if self._plan.dtype == "fp16":
            kept = find_islands(model, cases, self._folder)
            islands = tuple(str(node.name) for node in model.graph if node in kept)
            half_from_float(model, kept)
        path = write_model(model, folder)
        _write_json(folder / "config.json", dict(graph.config))
        self._step(f"{job.name}: verify")
        return self._entry(job, graph, islands, self._evidence(job.name, graph, path, cases))

    def _evidence(
        self, name: str, graph: Graph | AdoptedGraph, model: Path, cases: tuple[Inputs, ...]
    ) -> tuple[Evidence, ...]:
        """How close a graph on disk is to PyTorch; nothing of an adopted one that there is no checkpoint of."""
        if isinstance(graph, AdoptedGraph) and not self._references:
            require_plausible(name, graph, model, cases[PROBE])
            return ()
        reference = reference_of(name, graph, self._references) if isinstance(graph, AdoptedGraph) else graph
        comparisons = compare(name, reference, model, cases, self._plan.dtype)
        require_close(name, comparisons)
        return tuple(each.evidence for each in comparisons)

    def _entry(self, job: Job, graph: Interface, islands: tuple[str, ...], evidence: tuple[Evidence, ...]) -> Component:
        denoiser = graph.role == "denoiser"
        return Component(
            role=graph.role,
            model=f"{job.name}/{MODEL_NAME}",
            inputs=graph.inputs,
            outputs=graph.outputs,
            precision=self._plan.dtype,
            fp32_islands=islands,
            source=Source(class_name=job.part.class_name, sha256=self._sources.digest(job.part)),
            parameters=graph.parameters,
            prediction_type=prediction_type(self._sources.main.scheduler) if denoiser else None,
            spatial_multiple=graph.multiple if graph.role in ("denoiser", "controlnet") else 1,
            scheduler=job.scheduler,
            evidence=evidence,
        )

    def _defaults(self) -> Defaults:
        factor = latent_space(self._sources.main.vae).downsampling
        height, width = (size * factor for size in self._sources.sample_size)
        plan = self._plan
        steps = plan.num_inference_steps if plan.timesteps is None else len(plan.timesteps)
        wanted = {
            "num_inference_steps": steps,
            "guidance_scale": plan.guidance_scale,
            "timesteps": plan.timesteps,
            "eta": plan.eta,
        }
        given = {key: value for key, value in wanted.items() if value is not None}
        return msgspec.structs.replace(Defaults(height=height, width=width), **given)

    def _write_pipeline_files(self) -> None:
        """`model_index.json` and the scheduler's configuration, as optimum's ORT pipelines read them."""
        main = self._sources.main
        version_of = {"_diffusers_version": self._producers["diffusers"]}
        (self._folder / "scheduler").mkdir()
        _write_json(
            self._folder / "scheduler" / "scheduler_config.json",
            {"_class_name": main.scheduler.class_name, **version_of, **main.scheduler.config},
        )
        index: dict[str, Any] = {
            "_class_name": main.pipeline,
            **version_of,
            "scheduler": ["diffusers", main.scheduler.class_name],
            main.family.denoiser: ["diffusers", main.denoiser.class_name],
            "vae": ["diffusers", main.vae.class_name],
        }
        for name, source in main.texts.items():
            index[name] = ["transformers", source.encoder.class_name]
            index[tokenizer_of(name)] = ["transformers", TOKENIZERS[source.encoder.class_name][0]]
        for name in main.family.optional - main.texts.keys():
            index[name] = index[tokenizer_of(name)] = [None, None]
        if len(main.family.text_encoders) == 1:
            index.update(_NO_CHECKER)
        if main.zero_negative:
            index["force_zeros_for_empty_prompt"] = True
        _write_json(self._folder / "model_index.json", index)

    def _step(self, message: str) -> None:
        self._progress(message, self._done, self._total)
        self._done += 1


def write_model(model: ir.Model, folder: Path) -> Path:
    """Write a component's graph; what is verified afterwards is what this left on disk."""
    return save(model, folder)


def _installed_versions() -> dict[str, str]:
    found = {name: version(name) for name in _PRODUCERS}
    for name in _RUNTIMES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _require_readable(manifest: Manifest) -> None:
    """Check that a runtime reads the manifest's bytes back as the same manifest."""
    try:
        same = decode(encode(manifest), MANIFEST_NAME) == manifest
    except BundleError as error:
        raise ExportError(MANIFEST_NAME, f"cannot be read back ({error})") from error
    if not same:
        raise ExportError(MANIFEST_NAME, "does not read back as it was written")
