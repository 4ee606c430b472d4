"""What an engine depends on, and whether one can be built for a target at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..runtime.bundle import Bundle
from ..runtime.engine_files import RECIPES, Ingredients, InputRange, architecture_of, origin_of, weights_of
from ..runtime.targets import ENGINES_ONLY, Target, installed_version
from . import flavour, onnxruntime, openvino

# A profile's name, and the shapes of a component's inputs in it.
Named = tuple[str, dict[str, InputRange]]


def require_buildable(target: Target, options: flavour.Options = flavour.PLAIN_OPTIONS) -> None:
    """Raise TargetError when engines for a target cannot be built here."""
    if target.backend in ENGINES_ONLY:
        flavour.require_buildable(target.backend, target.device, options)
    elif target.backend == "openvino":
        openvino.require_buildable(target.device, target.precision or "fp32")
    else:
        onnxruntime.require_buildable(target.device)


def exact_target(target: Target, name: str, bundle: Bundle) -> Target:
    """The target as it is for component `name`, with the precision it computes in.

    Raises:
        TargetError: the component was not exported in the precision that the target asks for.
    """
    component = bundle.component(name)
    target = target.of_component(component)
    target.check_precision(name, component.precision)
    return target


def merged(ranges: Sequence[Named]) -> list[Named]:
    """Profiles with those that come to the same shapes as one, under all their names."""
    distinct: list[Named] = []
    for label, one in ranges:
        place = next((place for place, (_, other) in enumerate(distinct) if other == one), None)
        if place is None:
            distinct.append((label, one))
        else:
            distinct[place] = f"{distinct[place][0]}, {label}", one
    return distinct


def grouped(target: Target, ranges: Sequence[Named]) -> list[list[Named]]:
    """Which profiles go into one engine of a target; see `merged`."""
    distinct = merged(ranges)
    if target.backend in ENGINES_ONLY:
        return [distinct]
    if target.backend == "openvino":  # has no profiles: an engine for each
        return [[one] for one in distinct]
    return [[]]  # ONNX Runtime takes every shape


def ingredients_of(
    bundle: Bundle,
    name: str,
    target: Target,
    profiles: tuple[Mapping[str, InputRange], ...],
    options: flavour.Options = flavour.PLAIN_OPTIONS,
) -> Ingredients:
    """What an engine of component `name` depends on, as it was exported.

    Raises:
        TargetError: the component is not in the precision that the target asks for, or the backend is not installed.
    """
    exact = exact_target(target, name, bundle)
    precision = exact.precision or bundle.component(name).precision
    return Ingredients(
        graph=origin_of(bundle, name),
        weights=weights_of(bundle, name),
        origin=origin_of(bundle, name),
        profiles=tuple(dict(one) for one in profiles),
        backend=target.backend,
        backend_version=installed_version(target.backend),
        device="+".join(sorted(set(target.device.split("+")), key=lambda device: (len(device), device))),
        architecture=architecture_of(target),
        precision=precision,
        flags=_flags(target, precision, options),
        recipe=RECIPES[target.backend],
    )


def _flags(target: Target, precision: str, options: flavour.Options) -> dict[str, str | int | bool]:
    if target.backend == "openvino":
        return openvino.configuration(target.device, precision)
    return options.flags(target.backend, target.device) if target.backend in ENGINES_ONLY else {}
