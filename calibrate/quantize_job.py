"""What is to be quantized and how it is judged: all that can be known, and refused, before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime.architecture import cpu_architecture
from ..runtime.bundle import Bundle
from ..runtime.cache import cache_folder
from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.manifest import Role
from ..runtime.plan_steps import parse_steps
from ..runtime.staging import require_free
from .derived import require_another
from .judged import NO_PROMPTS, Painting, Way, ways_of
from .prompts import chosen_prompts, require_apart
from .quantize_arguments import PROMPTS, QuantizePlan
from .quantizers import NEEDS_SAMPLES, layer_names
from .ranges import LIMITS
from .scorers import NamedScorer, scorer_of
from .strata import Runs
from .trajectories import Trajectories

# In this order, as they are given something by one another.
_ROLES: tuple[Role, ...] = ("text_encoder", "denoiser", "vae_decoder")
# Packages that make graphs and pictures, of which not all need be installed.
_RUN_BY = ("tandemrt", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf")


@dataclass(frozen=True)
class Job:
    """A plan with all that can be known before a model is loaded.

    judged: what the new bundle is judged by. searched: what a budget's layers are searched with, other prompts from
    other seeds; None without a budget. Neither prompts nor seeds are those of the trajectories.
    keep, ways: by component.
    """

    plan: QuantizePlan
    bundle: Bundle
    trajectories: Trajectories | None
    judged: Painting
    searched: Painting | None
    scorer: NamedScorer | None
    keep: Mapping[str, tuple[str, ...]]
    ways: Mapping[str, tuple[Way, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The components to quantize, in order."""
        return tuple(self.ways)

    def samples(self, name: str) -> int | None:
        """How many samples of a component are calibrated with; None where the format needs none."""
        if self.trajectories is None or self.plan.format not in NEEDS_SAMPLES:
            return None
        return min(self.plan.samples, self.trajectories.count(name))

    def ground(self) -> dict[str, Any]:
        """All that a search's figures rest on but prompts and seeds, JSON-able."""
        plan, settings = self.plan, self.plan.int8
        return {
            "format": 1,
            "bundle": self.bundle.digest,
            "trajectories": None if self.trajectories is None else self.trajectories.digest,
            "quantized": [plan.format, plan.tool, settings.observer, settings.percentile, settings.smoothing],
            "samples": {name: self.samples(name) for name in self.names},
            "keep": dict(self.keep),
            "arguments": dict(self.judged.arguments),
            "scorer": None if self.scorer is None else self.scorer.facts(),
            "target": plan.target,
            "threads": plan.threads,
            "machine": cpu_architecture(),
            "versions": {name: one.version for name in _RUN_BY for one in islice(distributions(name=name), 1)},
        }

    @property
    def folder(self) -> Path:
        """Where what is found is kept, so that the same search goes on where it stopped."""
        ground = json.dumps(self.ground(), sort_keys=True).encode()
        return cache_folder(self.plan.cache) / "quantize" / hashlib.sha256(ground).hexdigest()


def job_of(plan: QuantizePlan) -> Job:
    """All that can be refused before a model is loaded.

    Raises:
        ArgumentError: an argument cannot be used, prompts were calibrated with, there are too few samples or prompts,
            or a component is quantized already.
        CalibrationError: trajectories of another bundle, or unfinished.
        ExportError: the new bundle's place is taken.
        BundleError: the bundle cannot be used.
    """
    require_free(plan.out, force=plan.force)
    bundle = Bundle.open(plan.bundle)
    require_another(bundle.path, plan.out)
    trajectories = None if plan.trajectories is None else Trajectories.open(plan.trajectories, bundle)
    names = _names(plan, bundle, trajectories)
    judged, searched = _paintings(plan, bundle, trajectories)
    return Job(
        plan=plan,
        bundle=bundle,
        trajectories=trajectories,
        judged=judged,
        searched=searched,
        scorer=None if plan.scorer is None else scorer_of(plan.scorer),
        keep=_keep(plan, bundle, names),
        ways=ways_of(bundle, names, _steps(plan, bundle, trajectories)),
    )


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
            _require_samples(trajectories, name)
    return names


def _require_samples(trajectories: Trajectories, name: str) -> None:
    count, least = trajectories.count(name), LIMITS.least_samples
    if count < least:
        remedy = "Collect from more prompts; few samples tell little of what the others reach."
        raise ArgumentError(name, "samples", got=count, expected=f"{least} or more", remedy=remedy)


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


def _paintings(
    plan: QuantizePlan, bundle: Bundle, trajectories: Trajectories | None
) -> tuple[Painting, Painting | None]:
    """What is judged by and what is searched with: the first prompts of the file, and as many behind them."""
    judged, searched = _prompts(plan)
    first = 0
    if trajectories is not None:
        require_apart(trajectories.prompts, (*judged, *searched))
        first = int(trajectories.record.settings["seed"]) + len(trajectories.prompts)
    arguments = _arguments(plan, bundle, trajectories)
    painting = Painting(judged, first, plan.target, plan.threads, plan.cache, arguments)
    if not plan.budget.asks:
        return painting, None
    return painting, replace(painting, prompts=searched, seed=first + len(judged))


def _prompts(plan: QuantizePlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those to judge by and those to search with, which are none without a budget."""
    if plan.prompts is None:
        return NO_PROMPTS, ()
    if not plan.budget.asks:
        return chosen_prompts(plan.prompts, plan.column, plan.count, PROMPTS), ()
    every = chosen_prompts(plan.prompts, plan.column, None, None)
    count = max(1, min(PROMPTS, len(every) // 2)) if plan.count is None else plan.count
    if len(every) < 2 * count:
        expected = f"{2 * count} or more: -n {count} to judge by, and as many to search for a budget's layers with"
        raise ArgumentError(str(plan.prompts), "prompts", got=len(every), expected=expected)
    return every[:count], every[count : 2 * count]


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
