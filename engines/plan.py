"""What `tandemrt build-engine` is asked to do, and the engines that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from ..runtime.bundle import Bundle
from ..runtime.engine_files import Ingredients, Shape, origin_of
from ..runtime.errors import ArgumentError, PlanError, TargetError
from ..runtime.manifest import Component, Manifest
from ..runtime.onnx_files import own_projections
from ..runtime.plan import Schedule, compile_plan
from ..runtime.stages import MOST_STAGES
from ..runtime.targets import ENGINES_ONLY, Target
from ..runtime.variant import MAX_LORA_RANK, MAX_LORA_SLOTS, PLAIN, UPDATE, Variant
from . import flavour
from .ingredients import Named, exact_target, grouped, ingredients_of, merged, require_buildable
from .profiles import Profile, check_profiles, default_profile, guided_by_default, input_ranges
from .together import for_each

_TAKE_LORAS = ("denoiser", "text_encoder")


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Engines of a bundle to have in a cache, built where they are not there.

    components: all where none is named. profiles: the bundle's default size where none is given.
    explain: say what is there and what is not, and why, and build nothing.
    lora_slots, lora_rank: how many LoRAs of up to which rank the denoisers and text encoders take as inputs.
    step: make step engines of the denoisers, for the guidance that each profile names, else the bundle's default.
    fold_steps: build the time steps of so many inference steps of the bundle's own scheduler into step engines; 0 for
        those of the bundle's defaults.
    options: of TensorRT's flavours alone.
    stages: how many stages to cut the denoisers into, an engine for each; 0 leaves them whole. For the targets in
        `ENGINES_ONLY`, where no graph runs the rows outside a window, they are built whole too.

    Whatever is made of a denoiser, for the targets in `ENGINES_ONLY` an update engine is built beside it.
    """

    bundle: Path
    targets: tuple[Target, ...]
    cache: Path
    components: tuple[str, ...] = ()
    profiles: tuple[Profile, ...] = ()
    explain: bool = False
    lora_slots: int = 0
    lora_rank: int = 0
    step: bool = False
    fold_steps: int | None = None
    options: flavour.Options = flavour.PLAIN_OPTIONS
    stages: int = 0

    def __post_init__(self) -> None:
        for option, values in (("--target", self.targets), ("--component", self.components)):
            named = [str(value) for value in values]
            twice = next((name for name in named if named.count(name) > 1), None)
            if twice is not None:
                raise ArgumentError(option, "given twice", got=twice)
        if self.fold_steps is not None and not self.step:
            raise ArgumentError(
                "--fold-steps", "given without --step", remedy="Time steps are built into step engines."
            )
        if bool(self.lora_slots) != bool(self.lora_rank):
            expected = "both 1 or more, or neither"
            got = self.lora_slots, self.lora_rank
            raise ArgumentError("--lora-slots, --lora-rank", "not both from 1 on", got=got, expected=expected)
        others = [str(target) for target in self.targets if target.backend not in ENGINES_ONLY]
        if self.options.words and others:
            expected = f"targets of {' or '.join(sorted(ENGINES_ONLY))} alone"
            raise ArgumentError(self.options.words, "not for this target", got=others[0], expected=expected)
        if self.options.refit:
            self._require_refittable()
        if self.stages and self.step:
            remedy = "A step engine needs the whole denoiser and serves no window; build each by itself."
            raise ArgumentError("--stages", "given together with --step", remedy=remedy)
        if self.stages and not 2 <= self.stages <= MOST_STAGES:
            raise ArgumentError("--stages", "out of range", got=self.stages, expected=f"a number in 2..{MOST_STAGES}")
        limits = (("--lora-slots", self.lora_slots, MAX_LORA_SLOTS), ("--lora-rank", self.lora_rank, MAX_LORA_RANK))
        for option, value, most in limits:
            if not 0 <= value <= most:
                raise ArgumentError(option, "out of range", got=value, expected=f"a number in 1..{most}")

    def _require_refittable(self) -> None:
        """Raise ArgumentError when engines would have other weights than the bundle's, to which LoRAs are added."""
        others = next((one.precision for one in self.targets if one.precision not in (None, "fp32", "fp16")), None)
        if others is not None:
            remedy = "Ask for fp16; a bundle's LoRAs are added to weights in fp32 or fp16."
            raise ArgumentError("--refit", f"not for precision {others}", remedy=remedy)
        for option, given, why in (
            ("--lora-slots", self.lora_slots, "Slots take LoRAs with each request"),
            ("--fold-steps", self.fold_steps is not None, "Weights that LoRAs change are folded away with time steps"),
            ("--stages", self.stages, "Stages take no LoRAs"),
        ):
            if given:
                raise ArgumentError("--refit", f"given together with {option}", remedy=f"{why}; build without one.")


@dataclass(frozen=True, slots=True)
class Request:
    """One engine that is wanted: of what, for which target, and all that it depends on.

    model: the bundle's own graph, which the variant in `ingredients` is made of. facts: of what is made.
    shapes: of the inputs of the call that is tuned for, of the first profile. largest: of those of the largest call of
        each profile that was asked for, by its name, also where the engine takes every shape.
    """

    component: str
    target: Target
    model: Path
    facts: Component
    ingredients: Ingredients
    profile_names: tuple[str, ...]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    largest: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The engine's place in a cache."""
        return self.ingredients.key

    @property
    def title(self) -> str:
        """The request in a few words."""
        variant = self.ingredients.variant
        made = f" ({variant})" if variant != PLAIN else ""
        names = f", {'; '.join(self.profile_names)}" if self.profile_names else ""
        return f"{self.component}{made} for {self.target}{names}"


def requests_of(plan: BuildPlan, bundle: Bundle) -> tuple[Request, ...]:
    """The engines of a plan, in the order of its targets and of the bundle's components.

    Raises:
        BundleError: a component's weights are such that LoRAs cannot be added to them for --refit.
        ArgumentError: the bundle has no such component; a profile is outside the models, or nothing of the kind can be
            made of them; there is no such architecture.
        TargetError: targets cannot be built for here, or ask for a precision that a component is not in, or that an
            architecture lacks; one of int8 or fp8 where nothing is quantized so, or a component that was named is not.
    """
    names = plan.components or tuple(bundle.manifest.components)
    bundle.require_components("--component", names)
    _require_takers(plan, {bundle.component(name).role for name in names})
    profiles = plan.profiles or (default_profile(bundle.manifest),)
    check_profiles(profiles, bundle.manifest, names)
    for_each(plan.targets, lambda target: _require_target(target, plan, bundle, names), "--target")
    for name in names if plan.options.refit else ():
        if bundle.component(name).role in _TAKE_LORAS:
            own_projections(bundle.model_path(name))
    graphs = {
        hands: [graph for name in names for graph in _graphs(plan, bundle, name, profiles, hands)]
        for hands in {target.backend in ENGINES_ONLY for target in plan.targets}
    }
    pairs = ((graph, target) for target in plan.targets for graph in graphs[target.backend in ENGINES_ONLY])
    return tuple(request for graph, target in pairs for request in _requests(plan, bundle, graph, target))


def _require_target(target: Target, plan: BuildPlan, bundle: Bundle, names: Sequence[str]) -> None:
    require_buildable(target, plan.options)
    target.check_quantized(str(bundle.path), bundle.manifest)
    for name in names:
        exact = exact_target(target, name, bundle)
        if name in plan.components and target.quantizes and exact.precision != target.precision:
            raise TargetError(
                name,
                f"is not quantized to {target.precision}, and {target} was asked for",
                remedy=f"Ask for {exact}, which runs beside what is.",
            )
        flavour.require_precision(name, exact, bundle.model_path(name))
        flavour.require_tables(name, exact, bundle.component(name))


def _require_takers(plan: BuildPlan, roles: set[str]) -> None:
    """Raise ArgumentError when an option is for components of which there is none."""
    for option, given, takers in (
        ("--step", plan.step, ("denoiser",)),
        ("--stages", plan.stages, ("denoiser",)),
        ("--lora-slots", plan.lora_slots, _TAKE_LORAS),
        ("--refit", plan.options.refit, _TAKE_LORAS),
    ):
        if given and roles.isdisjoint(takers):
            expected = f"a {' or '.join(takers)} among the components"
            raise ArgumentError(option, "nothing to make it of", got=", ".join(sorted(roles)), expected=expected)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A component as one variant, and the shapes of its inputs by the profiles' names."""

    name: str
    variant: Variant
    sha256: str
    facts: Component
    ranges: tuple[Named, ...]


def _graphs(plan: BuildPlan, bundle: Bundle, name: str, profiles: Sequence[Profile], hands: bool) -> Iterator[_Graph]:
    """What a plan wants to be made of a component, with the profiles that each is for.

    hands: whether it is for the targets in `ENGINES_ONLY`, as of `composed`.
    """
    component, manifest = bundle.component(name), bundle.manifest
    by_variant: dict[Variant, list[Profile]] = {}
    for profile in profiles:
        by_variant.setdefault(_variant(plan, manifest, name, profile), []).append(profile)
    if hands and component.role == "denoiser":
        by_variant[UPDATE] = list(profiles)
    for whole, served in by_variant.items():
        for variant, (sha256, facts) in _made(plan, bundle, name, whole, hands).items():
            if variant.step:
                from .composed import step_ranges  # noqa: PLC0415 (onnx, of the extra `export`)

                ranges = [(one.name, step_ranges(name, facts.inputs, manifest, one)) for one in served]
            else:
                # What stages hand on has shapes in formulas of the whole denoiser's inputs, not all of which each has.
                both = (*component.inputs, *(one for one in facts.inputs if one not in component.inputs))
                known = msgspec.structs.replace(facts, inputs=both)
                found = [(one.name, input_ranges(name, known, manifest, one)) for one in served]
                ranges = [(label, {one.name: all_of[one.name] for one in facts.inputs}) for label, all_of in found]
            yield _Graph(name, variant, sha256, facts, tuple(ranges))


def _made(
    plan: BuildPlan, bundle: Bundle, name: str, variant: Variant, hands: bool
) -> dict[Variant, tuple[str, Component]]:
    """The graphs that are wanted of a component as a variant, itself, its stages or both: sha256 and facts of each."""
    component = bundle.component(name)
    in_stages = bool(plan.stages) and component.role == "denoiser" and variant != UPDATE
    own = {PLAIN: (origin_of(bundle, name), component)}
    if variant == PLAIN and not in_stages:
        return own
    from .composed import composed_facts, composed_stages  # noqa: PLC0415 (onnx, of the extra `export`)

    whole = hands or not in_stages
    made = {variant: composed_facts(bundle, name, variant, hands=hands)} if whole and variant != PLAIN else {}
    if in_stages:
        made |= composed_stages(bundle, name, variant, plan.stages)
    composed = {one: (graph.sha256, graph.facts) for one, graph in made.items()}
    return {**own, **composed} if whole and variant == PLAIN else composed


def _variant(plan: BuildPlan, manifest: Manifest, name: str, profile: Profile) -> Variant:
    role = manifest.components[name].role
    takes_loras = role in _TAKE_LORAS
    slots = Variant(lora_slots=plan.lora_slots, lora_rank=plan.lora_rank) if takes_loras else PLAIN
    if not plan.step or role != "denoiser":
        return slots
    guided = guided_by_default(manifest, manifest.components[name])
    if profile.guidance != "any":
        guided = profile.guidance == "guided"
    return msgspec.structs.replace(
        slots, step="guided" if guided else "unguided", timesteps=_timesteps(manifest, plan.fold_steps)
    )


def _timesteps(manifest: Manifest, steps: int | None) -> tuple[float, ...]:
    """The time steps to build in, each once: none where `steps` is None, those of the bundle's defaults where it is 0.

    Raises:
        PlanError: the bundle's scheduler does not take so many steps.
    """
    if steps is None:
        return ()
    try:
        table = compile_plan(manifest, Schedule(steps=steps or None)).table
    except PlanError as error:
        if not steps:
            raise
        raise PlanError("--fold-steps", error.what, got=steps, expected=error.expected, remedy=error.remedy) from error
    return tuple(dict.fromkeys(table.timesteps.tolist()))


def _requests(plan: BuildPlan, bundle: Bundle, graph: _Graph, target: Target) -> Iterator[Request]:
    options = plan.options
    if bundle.component(graph.name).role not in _TAKE_LORAS or graph.variant == UPDATE:
        options = replace(options, refit=False)
    for group in grouped(target, graph.ranges):
        made_of = msgspec.structs.replace(
            ingredients_of(bundle, graph.name, target, tuple(one for _, one in group), options),
            graph=graph.sha256,
            variant=graph.variant,
        )
        model = bundle.model_path(graph.name)
        named = group or merged(graph.ranges)
        tuned = {name: one.opt for name, one in named[0][1].items()}
        largest = {label: {name: one.max for name, one in ranges.items()} for label, ranges in named}
        labels = tuple(label for label, _ in group)
        yield Request(graph.name, target, model, graph.facts, made_of, labels, tuned, largest)
