"""What is to be quantized and how it is judged: all that can be known, and refused, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime.architecture import cpu_architecture, usable_cpus
from ..runtime.bundle import Bundle
from ..runtime.cli.pictures import unwritable
from ..runtime.engine_files import origin_of, weights_of
from ..runtime.errors import ArgumentError, CalibrationError
from ..runtime.manifest import Manifest, QuantizationFormat, Role, SchedulerDefaults
from ..runtime.plan_steps import parse_steps
from ..runtime.staging import require_free
from ..runtime.targets import parse_target
from .cache_entries import entry_of
from .course import default_count, sharing_denoisers
from .derived import require_another
from .grounds import ground_of
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
# Formats that are for some of them alone: E4M3 is for what computes longest.
_ONLY: Mapping[QuantizationFormat, tuple[Role, ...]] = {"fp8": ("denoiser",)}
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
        """All that a search's figures rest on but prompts and seeds, JSON-able.

        Raises:
            TargetError: what runs the target is not installed, or its GPU is not here.
        """
        plan, settings = self.plan, self.plan.int8
        ground = ground_of(self.bundle, parse_target(plan.target), plan.threads, self.scorer)
        return {
            **ground,
            "versions": {**ground["versions"], **_versions(_RUN_BY)},
            "trajectories": None if self.trajectories is None else self.trajectories.digest,
            "quantized": [plan.format, plan.tool, settings.observer, settings.percentile, settings.smoothing],
            "samples": {name: self.samples(name) for name in self.names},
            "keep": dict(self.keep),
            "arguments": dict(self.judged.arguments),
        }

    @property
    def folder(self) -> Path:
        """Where what is found is kept, so that the same search goes on where it stopped."""
        return entry_of(self.plan.cache, "quantize", self.ground())

    def ranges(self, name: str) -> Path:
        """The file that keeps what is found of a component's values, whatever is made of it then."""
        ground = {
            "component": name,
            "graph": origin_of(self.bundle, name),
            "weights": weights_of(self.bundle, name),
            "trajectories": None if self.trajectories is None else self.trajectories.digest,
            "samples": self.samples(name),
            "threads": self.plan.int8.limits.threads,
            "machine": [cpu_architecture(), usable_cpus()],
            "versions": _versions(("tandemrt", "onnxruntime", "onnxruntime-gpu")),
        }
        return entry_of(self.plan.cache, "ranges", ground, ".npz")

    def forget_ranges(self) -> None:
        """Have them found anew.

        Raises:
            TandemError: they cannot be removed.
        """
        path = Path()
        try:
            for path in map(self.ranges, self.names):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(path, error, "--cache") from error


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    return {name: one.version for name in packages for one in islice(distributions(name=name), 1)}


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
        ways=ways_of(bundle, names, _steps(plan, bundle, trajectories, names)),
    )


def _names(plan: QuantizePlan, bundle: Bundle, trajectories: Trajectories | None) -> tuple[str, ...]:
    """The components to quantize, those that others are given something by first."""
    manifest = bundle.manifest
    bundle.require_components("--component", plan.components)
    able = [name for role in _ONLY.get(plan.format, _ROLES) for name in manifest.names(role)]
    for name in plan.components:
        if name not in able:
            got = f"{name}, a {manifest.components[name].role}"
            what = f"cannot be quantized to {plan.format}"
            raise ArgumentError("--component", what, got=got, expected=f"one of {', '.join(able)}")
    names = tuple(name for name in able if name in (plan.components or _default_names(able, manifest, trajectories)))
    for name in names:
        quantization = manifest.components[name].quantization
        if quantization is not None:
            remedy = "Quantize the bundle that this one was made of."
            raise ArgumentError(name, "is quantized already", got=quantization.format, remedy=remedy)
        if trajectories is not None and plan.format in NEEDS_SAMPLES:
            _require_samples(trajectories, name)
    return names


def _default_names(able: Sequence[str], manifest: Manifest, trajectories: Trajectories | None) -> list[str]:
    """Those that the trajectories are of, else all; but no denoiser that takes other steps than the bundle's."""
    if trajectories is not None:
        return [name for name in able if _is_seen(trajectories, name)]
    sharing = sharing_denoisers(manifest)
    return [name for name in able if manifest.components[name].role != "denoiser" or name in sharing]


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


def _steps(
    plan: QuantizePlan, bundle: Bundle, trajectories: Trajectories | None, names: Sequence[str]
) -> dict[str, Runs]:
    """What runs to show the denoisers in `names`: a plan in which one runs, else itself for as many steps in all.

    Where there are none, what shows the others: a denoiser of the trajectories or of the bundle's scheduler.

    Raises:
        ArgumentError: one has a scheduler of its own, and nothing says for how many steps.
    """
    manifest, settings = bundle.manifest, {} if trajectories is None else trajectories.record.settings
    first = str(settings["denoisers"][0]) if settings else sharing_denoisers(manifest)[0]
    like: str | None = first  # what the number of steps is of; None for any denoiser
    runs: Runs
    if plan.steps is not None:
        runs = tuple(run for run in parse_steps(plan.steps, manifest.names("denoiser")) if run[1])
        counted = plan.steps.strip().isdecimal()
        like = runs[0][0] if runs and not counted else None
    elif settings and not isinstance(settings["steps"], int):
        counted, runs = False, tuple((str(name), int(count)) for name, count in settings["steps"] if count)
    else:
        counted, runs = True, ((first, settings["steps"] if settings else default_count(manifest, first)),)
    total = sum(count for _, count in runs)
    shown = () if counted else tuple(name for name, _ in runs)

    def own(name: str) -> Runs:
        alike = like is None or _scheduler(manifest, name) == _scheduler(manifest, like)
        return ((name, total if alike else default_count(manifest, name)),)

    chosen = [name for name in names if manifest.components[name].role == "denoiser"]
    return {name: runs if name in shown else own(name) for name in chosen or [shown[0] if shown else first]}


def _scheduler(manifest: Manifest, name: str) -> SchedulerDefaults:
    return manifest.components[name].scheduler or manifest.scheduler
