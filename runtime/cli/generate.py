"""`tandemrt generate`: prompts in, PNG files out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ..backends import copies_directly, gpu_names
from ..bundle import Bundle
from ..cloud_reasons import reason_alone
from ..conditioning import dropped_text
from ..errors import TandemError
from ..files import file_sha256
from ..lora_files import read_lora
from ..manifest import Manifest
from ..output import Output
from ..pipeline import Pipeline
from ..plan import Plan, compile_plan
from ..request import Request
from ..targets import Target
from ..tokenizer import DroppedText
from ..trace import Trace
from .generate_arguments import GeneratePlan, add_arguments, plan_from_arguments
from .generate_stored import own_interval, own_steps, stored_facts
from .generate_told import (
    calibration_lines,
    cloud_lines,
    device_lines,
    guidance_line,
    passed_over_lines,
    plan_lines,
    summary,
)
from .picture_files import PictureFiles, read_picture
from .pictures import Names, check_folder, maker_facts, png_facts, unwritable, write_picture
from .reporter import Reporter

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "summary"]

LABEL_CHARACTERS = 32


def plan_facts(plan: GeneratePlan) -> dict[str, Any]:
    """What would be painted, JSON-able: all that `run` checks before it paints is checked, no model is loaded.

    Raises:
        TandemError: the bundle, an argument or the target cannot be used, or the folder cannot be written.
    """
    with _opened(plan) as pipe:
        checked = _checked(plan, pipe, _seed(plan))
        seeded = plan.seed is not None
        files = [names.picture(seed) for request, names in checked.named for seed in request["seed"]]
        return {
            "bundle": {"path": str(pipe.bundle.path), "digest": pipe.bundle.digest},
            "target": {"name": pipe.target.told(pipe.bundle.manifest), "reason": pipe.target.reason or "asked for"},
            "cloud": None if plan.cloud is None else plan.cloud.url,
            "devices": _device_facts(plan, pipe.target),
            "requests": [request if seeded else {**request, "seed": None} for request, _ in checked.named],
            "pictures": checked.pictures.facts(),
            "loras": _lora_facts(plan),
            "plan": checked.compiled.facts(),
            **stored_facts(plan, pipe.bundle.manifest, checked.compiled),
            "dropped_text": [asdict(dropped) for dropped in checked.dropped_text],
            "files": [str(path) for path in files] if seeded else None,
        }


def run(plan: GeneratePlan, reporter: Reporter) -> dict[str, Any]:
    """Paint every prompt; a picture is written as soon as it is there.

    Raises:
        TandemError: the bundle, an argument or the target cannot be used, or a file cannot be written.
    """
    if plan.trace is None:
        return _run(plan, reporter)
    check_folder((plan.trace,), force=True, option="--trace")
    trace = Trace()
    try:
        with trace.recording():
            result = _run(plan, reporter)
    except BaseException:
        try:
            _write_trace(trace, plan.trace)
        except TandemError as refused:
            reporter.warn(str(refused))
        raise
    _write_trace(trace, plan.trace)
    return result


def _run(plan: GeneratePlan, reporter: Reporter) -> dict[str, Any]:
    began = time.perf_counter()
    seed = _seed(plan)
    with _opened(plan) as pipe:
        checked = _checked(plan, pipe, seed)
        facts = {
            "plan": checked.compiled.facts(),
            **maker_facts(pipe.bundle.digest, pipe.target.told(pipe.bundle.manifest)),
            "pictures": checked.pictures.facts(),
            "loras": _lora_facts(plan),
        }
        stored, devices = stored_facts(plan, pipe.bundle.manifest, checked.compiled), _device_facts(plan, pipe.target)
        for line in (*passed_over_lines(stored), *device_lines(devices)):
            reporter.note(line)
        for line in calibration_lines({**facts, **stored}):
            reporter.warn(line)
        for dropped in checked.dropped_text:
            reporter.warn(f"{dropped.tokens} tokens too many, not painted: {dropped.text!r} of {dropped.prompt!r}")
        job, count = _Job(plan, pipe, checked.pictures.arguments(), facts, reporter), len(checked.named)
        images = [image for request, names in checked.named for image in job.paint(request, names, count)]
    return {
        **facts,
        "devices": devices,
        "plan": {**checked.compiled.facts(), "placement": images[0]["placement"]},  # that ran, where it was `auto`
        "seed": seed,
        "images": images,
        "dropped_text": [asdict(dropped) for dropped in checked.dropped_text],
        "seconds": round(time.perf_counter() - began, 3),
    }


def _device_facts(plan: GeneratePlan, target: Target) -> dict[str, Any] | None:
    """The GPUs that were asked for, and whether two of them copy to each other without the host's memory."""
    if plan.devices is None:
        return None
    direct = copies_directly(target) if len(target.gpus) > 1 else None
    return {"gpus": gpu_names(target), "direct_copies": direct}


def _opened(plan: GeneratePlan) -> Pipeline:
    return Pipeline.open(
        plan.bundle, plan.target, threads=plan.threads, cache=plan.cache, devices=plan.devices, cloud=plan.cloud
    )


@dataclass(frozen=True, slots=True)
class _Checked:
    """What a run paints: for each prompt the arguments of `Request` and the files' names; what is the same for all."""

    named: list[tuple[dict[str, Any], Names]]
    pictures: PictureFiles
    compiled: Plan
    dropped_text: tuple[DroppedText, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """What the prompts of one run share."""

    plan: GeneratePlan
    pipe: Pipeline
    pictures: Mapping[str, Any]
    facts: Mapping[str, Any]
    reporter: Reporter
    told: set[str] = field(default_factory=set)

    def paint(self, request: Mapping[str, Any], names: Names, prompts: int) -> Iterator[dict[str, Any]]:
        """Paint one prompt and write its pictures, each of which is described."""
        if self.plan.placement == "auto":
            how = "each placement is tried first, unless the cache has a choice for this machine"
            self._once(f"placement auto: {how}", self.reporter.note)
        label = f"{names.number}/{prompts} {request['prompt'][:LABEL_CHARACTERS]}"
        stream = self.pipe.stream(**request, **self.pictures, **_unrecorded(self.plan))
        for event in stream:
            self.reporter.progress(label, event.row + 1, event.rows)
            for seed, image in zip(request["seed"], event.preview, strict=bool(event.preview)):
                texts = {**png_facts(request, seed, self.facts), "row": str(event.row + 1)}
                write_picture(image, names.preview(seed, event.row), texts, force=self.plan.force)
        output = stream.result()
        self._tell(output)
        yield from self._written(output, request, names)

    def _tell(self, output: Output) -> None:
        """Say what the models ran on, why engines that were there did not run, and what became of guidance, if new."""
        ran_on = output.timings.ran_on
        ran = "; ".join(f"{name} on {' and '.join(dict.fromkeys(map(str, ones)))}" for name, ones in ran_on.items())
        refused = [
            f"{name} ran on {one}: {why}" for name, ones in ran_on.items() for one in ones for why in one.refused
        ]
        notes = [f"ran {ran}"]
        if self.plan.guidance == "adaptive" or self.plan.placement in ("auto", "hybridiff"):
            notes.append(guidance_line(output.plan, output.timings.tried))
        for note in notes:
            self._once(note, self.reporter.note)
        for why in refused:
            self._once(why, self.reporter.warn)
        for line in cloud_lines(output):
            self.reporter.note(line)
        if output.degraded:
            self.reporter.warn(f"the cloud did not help, and its steps ran here: {output.degraded}")

    def _once(self, told: str, tell: Callable[[str], None]) -> None:
        if told not in self.told:
            self.told.add(told)
            tell(told)

    def _written(self, output: Output, request: Mapping[str, Any], names: Names) -> Iterator[dict[str, Any]]:
        timings = output.timings
        spent = {name: getattr(timings, name) for name in ("text_ms", "image_ms", "denoise_ms", "decode_ms")}
        images = cast("tuple[Image.Image, ...]", output.images)
        # What ran: the placement where `auto` was asked for, and the steps where the cloud did not help.
        facts = {**self.facts, "plan": output.plan.facts()}
        if output.degraded:
            request = {**request, "steps": [list(run) for run in output.plan.steps]}
            facts["degraded"] = reason_alone(output.degraded)
        for seed, image in zip(output.seeds, images, strict=True):
            path = names.picture(seed)
            texts = png_facts(request, seed, facts)
            write_picture(image, path, texts, force=self.plan.force)
            self.reporter.line(str(path))
            yield {
                "path": str(path),
                "prompt": request["prompt"],
                "seed": seed,
                "timings": {name: round(value, 3) for name, value in spent.items()},
                "cloud": [asdict(one) for one in output.cloud],
                "degraded": output.degraded,
                "step_engines": timings.step_engines,
                "ran_on": {name: [asdict(one) for one in ran] for name, ran in timings.ran_on.items()},
                "placement": output.plan.placement,
                "tried_ms": dict(timings.tried),
                "taus": output.plan.taus,
                "guidance": [asdict(row) for row in output.plan.ran],
                "loras": {path: list(components) for path, components in output.loras.items()},
                "lora_scales": dict(request["loras"] or {}),
            }


def _requests(plan: GeneratePlan, manifest: Manifest, seed: int) -> list[dict[str, Any]]:
    """For each prompt the arguments of `Request` that decide its pictures, but for pictures; JSON-able."""
    steps, interval = own_steps(plan, manifest), own_interval(plan, manifest)
    return [
        {
            "prompt": prompt,
            "negative_prompt": plan.negative_prompt,
            **plan.further_prompts,
            "strength": plan.strength,
            "controlnet_conditioning_scale": _by_name(plan.control_scale),
            "control_guidance_start": _by_name({name: start for name, (start, _) in plan.control_interval.items()}),
            "control_guidance_end": _by_name({name: end for name, (_, end) in plan.control_interval.items()}),
            "steps": None if steps is None else [list(run) for run in steps],
            "num_inference_steps": plan.num_inference_steps,
            "solver": plan.solver,
            "solver_config": dict(plan.solver_config) or None,
            "timesteps": None if plan.timesteps is None else list(plan.timesteps),
            "eta": plan.eta,
            "guidance_scale": plan.guidance_scale,
            "guidance_interval": None if interval is None else list(interval),
            "guidance": plan.guidance,
            "guidance_config": dict(plan.guidance_config) or None,
            **({} if _same_picture(plan) else _placement(plan)),
            "height": plan.height,
            "width": plan.width,
            "num_images_per_prompt": plan.num_images_per_prompt,
            "seed": [seed + picture for picture in range(plan.num_images_per_prompt)],
            "seed_device": plan.seed_device,
            "decoder": plan.decoder,
            "loras": {str(path): scale for path, scale in plan.loras.items()} or None,
        }
        for prompt in plan.prompts
    ]


def _write_trace(trace: Trace, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.write(path)
    except OSError as error:
        raise unwritable(path, error, "--trace") from error


def _unrecorded(plan: GeneratePlan) -> dict[str, Any]:
    """Arguments of `Request` that do not change its pictures."""
    placement = _placement(plan) if _same_picture(plan) else {}
    return {"previews": plan.previews, "strict_prompts": plan.strict_prompts, **placement}


def _placement(plan: GeneratePlan) -> dict[str, Any]:
    return {"placement": plan.placement, "placement_config": dict(plan.placement_config) or None}


def _same_picture(plan: GeneratePlan) -> bool:
    """Whether the placement leaves the picture as it is."""
    return plan.placement != "hybridiff"


def _seed(plan: GeneratePlan) -> int:
    return secrets.randbits(32) if plan.seed is None else plan.seed


def _checked(plan: GeneratePlan, pipe: Pipeline, seed: int) -> _Checked:
    """All that can be refused before a model is loaded."""
    requests, pictures = _requests(plan, pipe.bundle.manifest, seed), _pictures(plan)
    made = [Request(**request, **pictures.arguments()) for request in requests]
    # The prompts differ in their text alone: what would refuse one refuses the first, before any is painted.
    pipe.stream(**requests[0], **pictures.arguments(), **_unrecorded(plan))
    schedule = made[0].schedule
    steps = schedule.steps if pipe.there is None else pipe.there.known(schedule.steps)
    compiled = compile_plan(pipe.manifest, replace(schedule, steps=steps, **_placement(plan)))
    dropped_text = _dropped_text(plan, pipe.bundle, compiled, made)
    named = [(request, Names(plan.output_dir, at, request["prompt"])) for at, request in enumerate(requests, start=1)]
    check_folder(_files(plan, named, compiled), force=plan.force)
    return _Checked(named, pictures, compiled, dropped_text)


def _pictures(plan: GeneratePlan) -> PictureFiles:
    return PictureFiles(
        None if plan.image is None else read_picture("--image", plan.image),
        None if plan.mask is None else read_picture("--mask", plan.mask),
        {name: read_picture("--control", path) for name, path in plan.control.items()},
    )


def _lora_facts(plan: GeneratePlan) -> dict[str, dict[str, str]]:
    """The sha256 of each LoRA's files by their names, by its path."""
    return {str(path): {file.name: file_sha256(file) for file in read_lora(path).files} for path in plan.loras}


def _by_name(values: Mapping[str | None, float]) -> float | dict[str | None, float] | None:
    """A number for all, numbers by ControlNet, or None where nothing was said."""
    return values[None] if None in values else dict(values) or None


def _dropped_text(
    plan: GeneratePlan, bundle: Bundle, compiled: Plan, requests: Sequence[Request]
) -> tuple[DroppedText, ...]:
    """What a text encoder has no room for in any prompt: known, or refused, before the first one is painted."""
    asked = [replace(request, strict_prompts=plan.strict_prompts) for request in requests]
    every = [dropped_text(bundle, request, guided=any(compiled.guided)) for request in asked]
    return tuple(dict.fromkeys(dropped for each in every for dropped in each))


def _files(plan: GeneratePlan, named: list[tuple[dict[str, Any], Names]], compiled: Plan) -> Iterator[Path]:
    """Every file the run will write."""
    rows = range(plan.previews - 1, compiled.table.rows, plan.previews) if plan.previews > 0 else ()
    for request, names in named:
        for seed in request["seed"]:
            yield names.picture(seed)
            yield from (names.preview(seed, row) for row in rows)
