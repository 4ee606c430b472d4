"""`tandemrt calibrate quantize`: a bundle made of another one, with some components in eight or four bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.bundle import Bundle
from ..runtime.cli.inspect_bundle import prompts_text, size_text
from ..runtime.cli.reporter import Reporter
from ..runtime.engine_files import origin_of, weights_of
from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.manifest import Loss, Quantization, Role
from ..runtime.plan_steps import parse_steps
from ..runtime.staging import require_free
from .budget import fewest_kept
from .derived import Derived, require_another
from .judged import NO_PROMPTS, Judge, Painting, Way, missed, ways_of
from .prompts import chosen_prompts, require_apart
from .quantize_arguments import PROMPTS, QuantizePlan, add_arguments, plan_from_arguments
from .quantizers import FORMATS, NEEDS_SAMPLES, TOOLS, Quantizer, Work, layer_names
from .scorers import scorer_of
from .strata import Runs
from .trajectories import Trajectories

__all__ = ["add_arguments", "plan_facts", "plan_from_arguments", "plan_lines", "run", "summary"]

# In this order, so that what is judged later shows with all that it is given changed already.
_ROLES: tuple[Role, ...] = ("text_encoder", "denoiser", "vae_decoder")
_Losses = dict[Way, tuple[Loss, ...]]


@dataclass(frozen=True)
class _Job:
    """A plan with all that can be known before a model is loaded. keep, ways: by component."""

    plan: QuantizePlan
    bundle: Bundle
    trajectories: Trajectories | None
    painting: Painting
    keep: Mapping[str, tuple[str, ...]]
    ways: Mapping[str, tuple[Way, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The components to quantize, in order."""
        return tuple(self.ways)


def plan_facts(plan: QuantizePlan) -> dict[str, Any]:
    """What would be quantized and painted, JSON-able; no model is loaded.

    Raises:
        TandemError: as `run`, where it can be known beforehand.
    """
    job = _job(plan)
    return {
        "bundle": {"path": str(job.bundle.path), "digest": job.bundle.digest},
        "out": str(plan.out),
        "format": plan.format,
        "components": {
            name: {
                "layers": len(layer_names(job.bundle.model_path(name), plan.format)),
                "kept": list(job.keep[name]),
                "samples": None if job.trajectories is None else job.trajectories.count(name),
                "painted": list(map(str, job.ways[name])),
            }
            for name in job.names
        },
        "prompts": len(job.painting.prompts),
        "held_out": job.painting.prompts != NO_PROMPTS,
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
    judged = f"{facts['prompts']} held-out prompts" if facts["held_out"] else "the empty prompt, as none are given,"
    yield f"judged by {judged} on {facts['target']}"


def run(plan: QuantizePlan, reporter: Reporter) -> dict[str, Any]:
    """Quantize, judge and publish.

    Raises:
        ArgumentError: an argument cannot be used, prompts were calibrated with, or a component is quantized already.
        CalibrationError: trajectories of another bundle, damaged ones, or a budget that cannot be met.
        ExportError: the new bundle's place is taken, or cannot be written.
        TandemError: the bundle or the target cannot be used, or a model failed.
    """
    job = _job(plan)
    scorer = None if plan.scorer is None else scorer_of(plan.scorer)
    judge = Judge(job.bundle, job.painting, plan.budget, scorer, reporter.progress)
    with Derived(job.bundle, plan.out, force=plan.force) as derived:
        for name in job.names:
            make = FORMATS[plan.format] if plan.tool is None else TOOLS[plan.tool][1]
            quantizer = make(_work(job, name, reporter), plan.int8)
            _Candidates(job, name, quantizer, derived, judge).settle()
        # What was told when a component came need not be so with those that came later.
        bundle = derived.opened()
        losses = judge.losses(bundle, [way for name in job.names for way in job.ways[name]])
        for name in job.names:
            of_it = {way: losses[way] for way in job.ways[name]}
            _require_held(name, of_it, "with all components quantized")
            derived.tell_losses(name, _all(of_it))
        return _told(job, derived.publish())


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """What was made, for a person."""
    for name, one in result["components"].items():
        kept = f", {len(one['kept'])} kept in floating point" if one["kept"] else ""
        smaller = f"{size_text(one['size_bytes_before'])} to {size_text(one['size_bytes'])}"
        yield f"{name}: {one['layers']} layers in {result['format']}{kept}; {smaller}"
        for loss in one["losses"]:
            beside = "" if loss["reference"] is None else f", the float bundle's {loss['reference']:.1%}"
            value = f"{loss['value']:.1f} dB" if loss["metric"] == "psnr_db" else f"{loss['value']:.1%}"
            yield f"  {loss['metric']} {value}{beside}, {prompts_text(loss)}, {loss['painted']}"
    yield f"{result['out']}: digest {result['digest']}"


@dataclass
class _Candidates:
    """Graphs of one component with more or fewer layers kept, each painted once."""

    job: _Job
    name: str
    quantizer: Quantizer
    derived: Derived
    judge: Judge
    losses: dict[int, _Losses] = field(default_factory=dict)
    written: int = -1

    def settle(self) -> None:
        """Leave the graph in the derived bundle that keeps as few layers as the budget allows.

        Raises:
            CalibrationError: no number of them meets it; the nearest is named.
        """
        if not self.job.plan.budget.asks:
            self._write(0)
            return
        count = fewest_kept(self.quantizer.layers, self._holds)
        if count is None:
            nearest = max(self.losses, key=lambda kept: min(_margin(loss) for loss in _all(self.losses[kept])))
            where = f"with {nearest} of {self.quantizer.layers} layers in floating point, the nearest"
            _require_held(self.name, self.losses[nearest], where)
            return
        self._write(count)

    def _holds(self, count: int) -> bool:
        self._write(count)
        self.losses[count] = self.judge.losses(self.derived.opened(), self.job.ways[self.name])
        return not missed(self.losses[count])

    def _write(self, count: int) -> None:
        if self.written != count:
            self.derived.replace(self.name, lambda out: self._quantization(out, count))
            self.written = count

    def _quantization(self, out: Path, count: int) -> Quantization:
        kept = self.quantizer.worst(count) if count else ()
        done = self.quantizer.write(out, kept)
        trajectories, form = self.job.trajectories, self.job.plan.format
        settings = {**done.settings, "kept_for_the_budget": count}
        return Quantization(
            format=form,
            tool=str(settings.pop("tool", "tandemrt")),
            version=str(settings.pop("version", version("tandemrt"))),
            settings=settings,
            layers=len(done.layers),
            kept=done.kept,
            float_model=origin_of(self.job.bundle, self.name),
            trajectories=trajectories.digest if trajectories is not None and form in NEEDS_SAMPLES else None,
        )


def _require_held(name: str, losses: _Losses, where: str) -> None:
    """Raise CalibrationError when something is not within the budget."""
    worst = min(missed(losses), key=_margin, default=None)
    if worst is not None:
        psnr = worst.metric == "psnr_db"
        got = f"{worst.value:.1f} dB" if psnr else f"{worst.value:.3f}"
        expected = (
            f"at least {worst.at_least:.4g}{' dB' if psnr else ', of the float bundle ' + f'{worst.reference:.3f}'}"
        )
        remedy = "Ask for less, for another format, or keep more with --keep."
        raise CalibrationError(
            f"{name}, {where}", f"budget of {worst.metric}", got=got, expected=expected, remedy=remedy
        )


def _margin(loss: Loss) -> float:
    """How far within its budget a loss is, relative to it; negative beyond."""
    return float("inf") if loss.at_least is None else (loss.value - loss.at_least) / max(loss.at_least, 1e-9)


def _all(losses: _Losses) -> list[Loss]:
    return [loss for each in losses.values() for loss in each]


def _job(plan: QuantizePlan) -> _Job:
    """All that can be refused before a model is loaded."""
    require_free(plan.out, force=plan.force)
    bundle = Bundle.open(plan.bundle)
    require_another(bundle.path, plan.out)
    trajectories = None if plan.trajectories is None else Trajectories.open(plan.trajectories, bundle)
    names = _names(plan, bundle, trajectories)
    painting = Painting(_prompts(plan, trajectories), plan.target, plan.threads, _arguments(plan, bundle, trajectories))
    steps = _steps(plan, bundle, trajectories)
    return _Job(plan, bundle, trajectories, painting, _keep(plan, bundle, names), ways_of(bundle, names, steps))


def _names(plan: QuantizePlan, bundle: Bundle, trajectories: Trajectories | None) -> tuple[str, ...]:
    """The components to quantize, those that others are given something by first."""
    manifest = bundle.manifest
    bundle.require_components("--component", plan.components)
    able = [name for role in _ROLES for name in manifest.names(role)]
    for name in plan.components:
        if name not in able:
            got = f"{name}, a {manifest.components[name].role}"
            raise ArgumentError("--component", "cannot be quantized", got=got, expected=f"one of {', '.join(able)}")
    seen = able if trajectories is None else [name for name in able if _is_seen(trajectories, name)]
    names = tuple(name for name in able if name in (plan.components or seen))
    for name in names:
        quantization = manifest.components[name].quantization
        if quantization is not None:
            remedy = "Quantize the bundle that this one was made of."
            raise ArgumentError(name, "is quantized already", got=quantization.format, remedy=remedy)
        if trajectories is not None and plan.format in NEEDS_SAMPLES:
            trajectories.samples(name)
    return names


def _is_seen(trajectories: Trajectories, name: str) -> bool:
    try:
        return trajectories.count(name) > 0
    except CalibrationError:
        return False


def _keep(plan: QuantizePlan, bundle: Bundle, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The layers of each component that --keep names."""
    layers = {name: layer_names(bundle.model_path(name), plan.format) for name in names}
    for pattern in plan.keep:
        if not any(fnmatchcase(layer, pattern) for known in layers.values() for layer in known):
            expected = f"a layer or a pattern of {', '.join(names)}, such as {next(iter(layers.values()))[0]}"
            raise ArgumentError("--keep", "no such layer", got=pattern, expected=expected)
    return {
        name: tuple(layer for layer in known if any(fnmatchcase(layer, pattern) for pattern in plan.keep))
        for name, known in layers.items()
    }


def _prompts(plan: QuantizePlan, trajectories: Trajectories | None) -> tuple[str, ...]:
    """Those to judge by, none of which was calibrated with."""
    if plan.prompts is None:
        return NO_PROMPTS
    prompts = chosen_prompts(plan.prompts, plan.column, plan.count, PROMPTS)
    if trajectories is not None:
        require_apart(trajectories.prompts, prompts)
    return prompts


def _arguments(plan: QuantizePlan, bundle: Bundle, trajectories: Trajectories | None) -> dict[str, Any]:
    """What is asked of every generation: as when the trajectories were collected, where there are some."""
    settings = {} if trajectories is None else trajectories.record.settings
    taken = {key: settings.get(key) for key in ("negative_prompt", "height", "width", "guidance_scale")}
    if plan.guidance_scale is not None:
        taken["guidance_scale"] = plan.guidance_scale
    if plan.steps is None:
        taken["timesteps"] = (
            settings.get("timesteps") if trajectories is not None else bundle.manifest.defaults.timesteps
        )
    return {key: value for key, value in taken.items() if value is not None}


def _steps(plan: QuantizePlan, bundle: Bundle, trajectories: Trajectories | None) -> dict[str, Runs]:
    """By denoiser what runs to show it: a plan in which it runs, else itself for as many steps in all."""
    every, defaults = bundle.manifest.names("denoiser"), bundle.manifest.defaults
    runs: Runs = ()
    if plan.steps is not None:
        runs = parse_steps(plan.steps, every)
        counted = plan.steps.strip().isdecimal()
    elif trajectories is not None:
        steps = trajectories.record.settings["steps"]
        counted = isinstance(steps, int)
        runs = ((every[0], steps),) if isinstance(steps, int) else tuple((str(name), int(n)) for name, n in steps)
    else:
        counted = True
        runs = ((every[0], defaults.num_inference_steps if defaults.timesteps is None else len(defaults.timesteps)),)
    runs = tuple(run for run in runs if run[1])
    total = sum(count for _, count in runs)
    shown = () if counted else tuple(name for name, _ in runs)
    return {name: runs if name in shown else ((name, total),) for name in every}


def _work(job: _Job, name: str, reporter: Reporter) -> Work:
    samples: Callable[[], Iterator[dict[str, Any]]] | None = None
    if job.trajectories is not None:
        trajectories = job.trajectories
        samples = lambda: trajectories.samples(name)  # noqa: E731
    return Work(job.bundle.model_path(name), samples, job.keep[name], reporter.progress)


def _told(job: _Job, made: Bundle) -> dict[str, Any]:
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
