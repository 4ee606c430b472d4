"""Exports a checkpoint: every part read, exported, compared with PyTorch, and published together as one bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from onnxscript import ir

from ..runtime.errors import BundleError, ExportError
from ..runtime.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Component,
    Defaults,
    Evidence,
    FileRecord,
    LatentSpace,
    Manifest,
    SchedulerDefaults,
    Source,
    TextConditioning,
    decode,
    encode,
    file_sha256,
)
from .agreement import latent_space, prediction_type
from .checkpoint import Part
from .graph import onnx_from_module, quiet, save
from .half import find_islands, half_from_float
from .modules import Graph, decoder_graph, denoiser_graph, encoder_graph, text_encoder_graph
from .parity import verify
from .plan import ExportPlan, Progress, no_progress
from .publish import Staging, writing_failed
from .samples import Samples
from .sources import Sources, read_sources
from .tokenizer import export_tokenizer, token_ids

_PRODUCERS = ("tandemrt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
_STEPS_PER_COMPONENT = 3


def export_bundle(plan: ExportPlan, progress: Progress = no_progress) -> Path:
    """Export a checkpoint as a verified bundle and return the bundle's path.

    Raises:
        CheckpointError: a source is no checkpoint, is damaged, is of an unsupported kind, or does not fit the others.
        ExportError: torch could not export a part, a part missed its parity threshold, or the bundle cannot be written.
            Nothing was published; a bundle that was there is still there.
    """
    sources = read_sources(plan)
    with Staging(plan.out, force=plan.force) as staging:
        try:
            manifest = _Export(plan, sources, staging.folder, progress).run()
            (staging.folder / MANIFEST_NAME).write_bytes(_checked(manifest))
        except OSError as error:
            raise writing_failed(staging.out, error) from error
        staging.publish()
    return staging.out


@dataclass(frozen=True)
class _Job:
    """One component to make: the part it comes from and how its graph is built."""

    name: str
    part: Part
    graph: Callable[[], Graph]
    scheduler: SchedulerDefaults | None = None


class _Export:
    """One run: what was learnt on the way from part to part."""

    def __init__(self, plan: ExportPlan, sources: Sources, folder: Path, progress: Progress) -> None:
        self._plan, self._sources, self._folder, self._progress = plan, sources, folder, progress
        self._latent: LatentSpace = latent_space(sources.main.vae)
        self._text_width = int(sources.main.text_encoder.config.get("hidden_size", 512))
        self._done, self._total = 0, 0
        self._samples: Samples | None = None

    def run(self) -> Manifest:
        """Write everything but the manifest to the folder."""
        main = self._sources.main
        positions = int(main.text_encoder.config.get("max_position_embeddings", 77))
        length = export_tokenizer(main.tokenizer, self._folder / "tokenizer", positions)
        jobs = list(self._jobs())
        self._total = _STEPS_PER_COMPONENT * len(jobs) + 1
        components = {job.name: self._component(job) for job in jobs}
        self._progress("publish", self._done, self._total)
        self._write_pipeline_files()
        defaults = Defaults(height=self._pixels(0), width=self._pixels(1))
        wanted = {"num_inference_steps": self._plan.num_inference_steps, "guidance_scale": self._plan.guidance_scale}
        given = {key: value for key, value in wanted.items() if value is not None}
        return Manifest(
            format=FORMAT,
            producers={name: version(name) for name in _PRODUCERS},
            components=components,
            files=_file_records(self._folder),
            latent=self._latent,
            text=TextConditioning(max_length=length, width=self._text_width),
            scheduler=main.scheduler,
            defaults=msgspec.structs.replace(defaults, **given),
        )

    def _jobs(self) -> Iterator[_Job]:
        main, width = self._sources.main, self._text_width
        yield _Job("text_encoder", main.text_encoder, lambda: text_encoder_graph(main.text_encoder))
        yield _Job("unet", main.unet, lambda: denoiser_graph(main.unet, width))
        for name, source in self._sources.denoisers.items():
            own = source.scheduler if source.scheduler != main.scheduler else None
            yield _Job(name, source.unet, lambda part=source.unet: denoiser_graph(part, width), own)
        for name, vae in {"vae_decoder": main.vae, **self._sources.decoders}.items():
            yield _Job(name, vae, lambda part=vae: decoder_graph(part, self._latent))
        yield _Job("vae_encoder", main.vae, lambda: encoder_graph(main.vae))

    def _component(self, job: _Job) -> Component:
        """Load, export and verify one model; only this one is in memory meanwhile."""
        self._step(f"{job.name}: load")
        with quiet():
            graph = job.graph()
            samples = self._samples_from(graph)
        self._step(f"{job.name}: export {graph.parameters / 1e6:.1f} M parameters")
        folder = self._folder / job.name
        folder.mkdir()
        cases = samples.cases(graph)
        model = onnx_from_module(job.name, graph)
        islands: tuple[str, ...] = ()
        if self._plan.dtype == "fp16":
            kept = find_islands(model, self._folder / f"{job.name}.audit", cases)
            islands = tuple(str(node.name) for node in model.graph if node in kept)
            half_from_float(model, kept)
        path = write_model(model, folder)
        _write_json(folder / "config.json", dict(graph.config))
        self._step(f"{job.name}: verify")
        evidence = verify(job.name, graph, path, cases, self._plan.dtype)
        return self._entry(job, graph, islands, evidence)

    def _entry(self, job: _Job, graph: Graph, islands: tuple[str, ...], evidence: tuple[Evidence, ...]) -> Component:
        denoiser = graph.role == "denoiser"
        return Component(
            role=graph.role,
            model=f"{job.name}/model.onnx",
            inputs=graph.inputs,
            outputs=graph.outputs,
            precision=self._plan.dtype,
            fp32_islands=islands,
            source=Source(class_name=job.part.class_name, sha256=self._sources.digest(job.part)),
            parameters=graph.parameters,
            prediction_type=prediction_type(self._sources.main.scheduler) if denoiser else None,
            spatial_multiple=graph.multiple if denoiser else 1,
            scheduler=job.scheduler,
            evidence=evidence,
        )

    def _samples_from(self, graph: Graph) -> Samples:
        """The inputs to compare on, made when the text encoder, which comes first, is there."""
        if self._samples is None:
            with quiet():
                encoder = encoder_graph(self._sources.main.vae)
            self._samples = Samples(
                token_ids(self._folder / "tokenizer"),
                graph.module,
                encoder.module,
                self._latent,
                self._sources.main.scheduler,
                max(self._sample_size()),
            )
        return self._samples

    def _write_pipeline_files(self) -> None:
        """`model_index.json` and the scheduler's configuration, as optimum's ORT pipelines read them."""
        main = self._sources.main
        (self._folder / "scheduler").mkdir()
        shutil.copyfile(main.scheduler_config, self._folder / "scheduler" / "scheduler_config.json")
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": version("diffusers"),
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", main.scheduler.class_name],
            "text_encoder": ["transformers", main.text_encoder.class_name],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", main.unet.class_name],
            "vae": ["diffusers", main.vae.class_name],
        }
        _write_json(self._folder / "model_index.json", index)

    def _sample_size(self) -> tuple[int, int]:
        size = self._sources.main.unet.config.get("sample_size") or 64
        height, width = size if isinstance(size, list) else (size, size)
        return int(height), int(width)

    def _pixels(self, axis: int) -> int:
        return self._sample_size()[axis] * self._latent.downsampling

    def _step(self, message: str) -> None:
        self._progress(message, self._done, self._total)
        self._done += 1


def write_model(model: ir.Model, folder: Path) -> Path:
    """Write a component's graph; what is verified afterwards is what this left on disk."""
    return save(model, folder)


def _file_records(folder: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=file_sha256(path))
        for path in paths
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked(manifest: Manifest) -> bytes:
    """The manifest's bytes, which a runtime reads back as the same manifest."""
    raw = encode(manifest)
    try:
        same = decode(raw, MANIFEST_NAME) == manifest
    except BundleError as error:
        raise ExportError(MANIFEST_NAME, f"cannot be read back ({error})") from error
    if not same:
        raise ExportError(MANIFEST_NAME, "does not read back as it was written")
    return raw
