"""ControlNets: what a request says about them, and what they add to a denoiser's skip connections."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from .arguments import did_you_mean, finite_number
from .backends.base import Session
from .binding import Bound, Conditioning, bind
from .errors import BundleError, RequestError
from .manifest import Component, Manifest
from .pictures_in import Pictures, Size, colour_pixels
from .plan import Plan
from .request import Request
from .request_checks import require_count
from .tensors import CONTROLNET_PREFIX, GIVEN, TAKEN, spec_of
from .trace import span
from .transfers import write

Float32 = npt.NDArray[np.float32]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Control:
    """One ControlNet of a request, checked.

    image: (N, 3, H, W) float32 in [0, 1], N being 1 or the number of prompts. rows: in which of the plan's it runs.
    """

    component: str
    image: Float32
    scale: float
    rows: tuple[bool, ...]

    def conditioning(self, given: Conditioning, pictures: int) -> Conditioning:
        """`given`, the text's, with the image and its scale."""
        image = {"controlnet_cond": self.image.repeat(pictures // len(self.image), axis=0)}
        other = None if given.unconditional is None else {**given.unconditional, **image}
        whole = {"conditioning_scale": np.array([self.scale], np.float32)}
        return Conditioning({**given.conditional, **image}, other, whole=whole)


def checked_controls(request: Request, manifest: Manifest, plan: Plan, size: Size) -> tuple[Control, ...]:
    """The ControlNets a request names, in the bundle's order; `size` is the picture's height and width.

    Raises:
        RequestError: the bundle has none, or none of a name; one that is given twice; an image or scale that cannot be
            used; an interval that cannot, or holds no row; a denoiser that cannot be steered, or not by this
            ControlNet, where one is to run.
    """
    known = {name.removeprefix(CONTROLNET_PREFIX): name for name in manifest.names("controlnet")}
    if request.control_image is None:
        return ()
    if not known:
        remedy = "Export it again with `--add controlnet_NAME=DIR`."
        raise RequestError("control_image", "the bundle has no ControlNet", remedy=remedy)
    images = _images(request.control_image, tuple(known))
    scales = _numbers("controlnet_conditioning_scale", request.controlnet_conditioning_scale, 1.0, images)
    starts = _numbers("control_guidance_start", request.control_guidance_start, 0.0, images)
    ends = _numbers("control_guidance_end", request.control_guidance_end, 1.0, images)
    controls = []
    for name, component in known.items():
        if name not in images:
            continue
        start, end = starts[name], ends[name]
        if not 0 <= start < end <= 1:
            expected = "0 <= start < end <= 1"
            got = f"{start:g} and {end:g}"
            raise RequestError(f"control_guidance_start and _end of {name!r}", "fractions", got=got, expected=expected)
        active = _active_rows(plan.table.rows, start, end)
        if not any(active):
            expected = f"one that holds a row of the plan, which has {plan.table.rows}"
            got = f"{start:g} and {end:g}"
            raise RequestError(f"control_guidance_start and _end of {name!r}", "interval", got=got, expected=expected)
        pixels = colour_pixels("control_image", images[name], size)
        require_count("control_image", len(pixels), request.batch)
        controls.append(Control(component, pixels, scales[name], active))
    for control in controls:
        _require_steerable(control, manifest, plan)
    return tuple(controls)


@dataclass(frozen=True, slots=True)
class Running:
    """A ControlNet with its buffers and, in them, its results."""

    control: Control
    bound: Bound
    results: tuple[Float32, ...]

    @property
    def finite(self) -> bool:
        """Whether the latest results hold neither NaN nor Inf."""
        return all(bool(np.isfinite(result).all()) for result in self.results)


class Steering:
    """The ControlNets of a generation; used by one thread at a time.

    sessions, conditioning: those of the ControlNets, by component.
    """

    def __init__(
        self,
        controls: tuple[Control, ...],
        sessions: Mapping[str, Session],
        conditioning: Mapping[str, Conditioning],
    ) -> None:
        self._controls, self._sessions, self._conditioning = controls, sessions, conditioning
        self._bound: dict[tuple[str, bool], Running] = {}

    def running(self, denoiser: Bound, row: int, *, guided: bool) -> list[Running]:
        """The row's ControlNets, with buffers that are made when they are first needed.

        Raises:
            BundleError: the shapes of their results are not those the denoiser takes.
            ExecutionError: the backend cannot allocate.
        """
        listed = [
            self._bound.get((control.component, guided)) or self._bind(control, denoiser, guided)
            for control in self._controls
            if control.rows[row]
        ]
        taken = [residual.shape for residual in denoiser.residuals.values()]
        for one in listed:
            made = [result.shape for result in one.results]
            if made != taken:
                raise BundleError(one.control.component, "shapes of the residuals", got=made, expected=str(taken))
        return listed

    def _bind(self, control: Control, denoiser: Bound, guided: bool) -> Running:
        name, (rows, *latent) = control.component, denoiser.sample.shape
        shape = (rows // (1 + guided), *latent)
        bound = bind(name, self._sessions[name], self._conditioning[name], shape, guided=guided)
        outputs = bound.binding.outputs
        self._bound[name, guided] = Running(control, bound, tuple(outputs[result] for result in GIVEN.names(outputs)))
        return self._bound[name, guided]


def steer(running: Sequence[Running], denoiser: Bound, timestep: float) -> None:
    """Run ControlNets on what the denoiser is given, and leave the sum of their results in its buffers.

    Without any these hold zeros, which change nothing, and go nowhere.
    """
    residuals = denoiser.residuals
    for index, one in enumerate(running):
        one.bound.sample[...] = denoiser.sample
        one.bound.timestep.fill(timestep)
        with span("model", one.bound.label):
            one.bound.binding.run()
        for result, residual in zip(one.results, residuals.values(), strict=True):
            if index:
                np.add(residual, result, out=residual)
            else:
                residual[...] = result
    if denoiser.steered and not running:
        for residual in residuals.values():
            residual.fill(0)
    if denoiser.steered or running:
        write(denoiser.binding, *residuals)
    denoiser.steered = bool(running)


def _images(given: Pictures | Mapping[str, Pictures], known: tuple[str, ...]) -> dict[str, Pictures]:
    """The images by ControlNet; one that has no name is for the only one there is."""
    listed = ", ".join(known)
    if not isinstance(given, Mapping):
        if len(known) > 1:
            expected = f"images by name, of {listed}"
            raise RequestError("control_image", "several ControlNets in the bundle", expected=expected)
        return {known[0]: given}
    images = _by_name("control_image", given, known, "unknown ControlNet")
    if not images:
        raise RequestError("control_image", "an empty mapping", expected=f"images by name, of {listed}")
    return images


def _numbers(
    name: str, given: float | Mapping[str, float] | None, default: float, images: Mapping[str, Pictures]
) -> dict[str, float]:
    """A number for every image: the one given for it, the one given for all, or the default."""
    named = {}
    if isinstance(given, Mapping):
        named = _by_name(name, given, images, "no image is given for this ControlNet")
    elif given is not None:
        named = dict.fromkeys(images, given)
    numbers = {}
    for key in images:
        number = finite_number(named.get(key, default))
        if number is None or abs(number) > float(np.finfo(np.float32).max):
            expected = "a finite float32 number, or numbers by ControlNet"
            raise RequestError(name, "not usable", got=named[key], expected=expected)
        numbers[key] = number
    return numbers


def _by_name(argument: str, given: Mapping[str, T], known: Collection[str], unknown: str) -> dict[str, T]:
    """The values by ControlNet, whose names may be those of their components too."""
    named: dict[str, T] = {}
    for key, value in given.items():
        name = key if key in known else str(key).removeprefix(CONTROLNET_PREFIX)
        if name not in known:
            expected, remedy = f"one of {', '.join(known)}", did_you_mean(name, known)
            raise RequestError(argument, unknown, got=name, expected=expected, remedy=remedy)
        if name in named:
            raise RequestError(argument, "a ControlNet given twice", got=name, expected="every one once")
        named[name] = value
    return named


def _active_rows(rows: int, start: float, end: float) -> tuple[bool, ...]:
    """Which model calls lie within the interval, as diffusers' StableDiffusionControlNetPipeline counts them."""
    return tuple(not (row / rows < start or (row + 1) / rows > end) for row in range(rows))


def _require_steerable(control: Control, manifest: Manifest, plan: Plan) -> None:
    results = GIVEN.names([spec.name for spec in manifest.components[control.component].outputs])
    for row, name in enumerate(plan.denoisers):
        if not control.rows[row]:
            continue
        given, taken = manifest.components[control.component], manifest.components[name]
        if spec_of(taken.inputs, TAKEN.mid) is None:
            raise RequestError(
                "control_image",
                f"row {row} is to run {control.component!r}, but its denoiser {name!r} takes nothing from ControlNets",
                remedy=_otherwise(row, plan.table.rows),
            )
        names = TAKEN.names([spec.name for spec in taken.inputs])
        widths = _widths(given, results), _widths(taken, names)
        if widths[0] != widths[1]:
            raise RequestError(
                "control_image",
                f"{control.component!r} is of another architecture than denoiser {name!r}",
                got=f"residuals of {widths[0]} channels",
                expected=str(widths[1]),
                remedy=_otherwise(row, plan.table.rows),
            )


def _otherwise(row: int, rows: int) -> str:
    """How to ask so that a row is not steered."""
    # Rounded up, so that the row before is steered still.
    end = math.ceil(row / rows * 1e4) / 1e4
    interval = (
        f"End it before, at control_guidance_end={end:g}" if row else "Begin it later with control_guidance_start"
    )
    return f"{interval}, or take steps on another denoiser."


def _widths(component: Component, names: tuple[str, ...]) -> list[int | str]:
    specs = {spec.name: spec for spec in (*component.inputs, *component.outputs)}
    return [specs[name].shape[1] for name in names]
