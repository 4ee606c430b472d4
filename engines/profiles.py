"""Optimization profiles: from the sizes and pictures a user asks for to the shapes of every input of a component.

The grammar, sizes in pixels and WIDTHxHEIGHT as in `tandemrt generate --size`:

    PROFILE = [NAME=] SIZE [:bCOUNT] [:guided | :unguided] [:opt=SIZE[:bNUMBER]]
    SIZE    = RANGE [x RANGE]     RANGE = NUMBER [..NUMBER]     COUNT = NUMBER [..NUMBER | -NUMBER | -bNUMBER]

`b` counts pictures per call. Classifier-free guidance runs both branches in one call, twice the batch: a profile covers
calls with and without it unless it says `guided` (both branches always) or `unguided` (never).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..runtime.engine_files import InputRange, Shape
from ..runtime.errors import ArgumentError, BundleError
from ..runtime.manifest import Component, Manifest, TensorSpec
from ..runtime.request_checks import MAX_PICTURES, MAX_SIDE
from ..runtime.shapes import evaluated
from ..runtime.tensors import GUIDANCE_EMBEDDING, spec_of

Guidance = Literal["any", "guided", "unguided"]

EXPECTED = "such as 512x512, 512x512:b1-b4 or 512..768x512..768:b1..4:opt=512x512:b1"
_RANGE = r"(\d{1,6})(?:\.\.(\d{1,6}))?"
_SIZE = re.compile(rf"{_RANGE}(?:[x×]{_RANGE})?")
_COUNT = re.compile(r"b(\d{1,6})(?:(?:\.\.|-)b?(\d{1,6}))?")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
# By role, the input whose last two axes are the picture's: height and width.
_SEEN = {
    "denoiser": ("sample", "hidden_states"),
    "controlnet": ("sample",),
    "vae_decoder": ("latent_sample",),
    "vae_encoder": ("sample",),
}
# Inputs whose first axis is the batch, as runtime/binding.py fills them.
_BATCHED = frozenset(
    {"input_ids", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "pooled_projections"}
    | {"controlnet_cond", GUIDANCE_EMBEDDING}
)
_AXES = {"width": "width in pixels", "height": "height in pixels", "b": "pictures per call"}
_SEQUENCES = frozenset({"input_ids", "encoder_hidden_states"})


@dataclass(frozen=True, slots=True)
class Span:
    """The least, the most, and the number in between that an engine is tuned for."""

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return str(self.minimum) if self.minimum == self.maximum else f"{self.minimum}..{self.maximum}"


@dataclass(frozen=True, slots=True)
class Profile:
    """Sides in pixels and pictures per call that an engine serves; checked where it is made.

    Raises:
        ArgumentError: minimum over maximum, optimum outside, or numbers no request could have.
    """

    name: str
    width: Span
    height: Span
    images: Span
    guidance: Guidance = "any"

    def __post_init__(self) -> None:
        limits = (("width", self.width, MAX_SIDE), ("height", self.height, MAX_SIDE), ("b", self.images, MAX_PICTURES))
        for axis, span, most in limits:
            if not 1 <= span.minimum <= span.maximum <= most:
                what, one = ("", "number") if span.minimum == span.maximum else ("range of ", "rising range")
                raise ArgumentError(f"--profile {self.name}", f"{what}{_AXES[axis]}", got=str(span),
                                    expected=f"a {one} in 1..{most}")  # fmt: skip
            if not span.minimum <= span.optimum <= span.maximum:
                raise ArgumentError(f"--profile {self.name}", f"opt of {axis}", got=span.optimum,
                                    expected=f"a number in {span.minimum}..{span.maximum}")  # fmt: skip

    def __str__(self) -> str:
        guidance = "" if self.guidance == "any" else f":{self.guidance}"
        return f"{self.width}x{self.height}:b{self.images}{guidance}"

    def points(self, *, guided_by_default: bool) -> tuple[Point, Point, Point]:
        """The smallest call, the one to tune for, and the largest."""
        tuned = self.guidance == "guided" or (self.guidance == "any" and guided_by_default)
        return (
            Point(self.width.minimum, self.height.minimum, self.images.minimum, self.guidance == "guided"),
            Point(self.width.optimum, self.height.optimum, self.images.optimum, tuned),
            Point(self.width.maximum, self.height.maximum, self.images.maximum, self.guidance != "unguided"),
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One call: sides in pixels, pictures, and whether both guidance branches run in it."""

    width: int
    height: int
    images: int
    guided: bool


def parse_profile(text: str) -> Profile:
    """The profile that a `--profile` describes; opt is the largest size and the fewest pictures where none is given.

    Raises:
        ArgumentError: not of the grammar above, or ranges that make no sense.
    """
    name, equals, rest = text.partition("=")
    if not equals or name.partition(":")[1]:  # the equals sign of opt=
        name, rest = text, text
    elif not _NAME.fullmatch(name):
        raise ArgumentError("--profile", "name", got=name, expected="a letter, then letters, digits, _ or -")
    size, *parts = rest.split(":")
    width, height = _sizes(text, size)
    images: tuple[int, int] | None = None
    best_images: tuple[int, int] | None = None
    best_size: tuple[tuple[int, int], tuple[int, int]] | None = None
    guidance: Guidance = "any"
    for part in parts:
        if part.startswith("opt=") and best_size is None:
            best_size = _sizes(text, part.removeprefix("opt="))
        elif part.startswith("b") and best_size is not None and best_images is None:
            best_images = _counts(text, part)
        elif part.startswith("b") and best_size is None and images is None:
            images = _counts(text, part)
        elif part in ("guided", "unguided") and guidance == "any":
            guidance = "guided" if part == "guided" else "unguided"
        else:
            raise _unreadable(text, part)
    fewest, most = images or (1, 1)
    best_width, best_height = (width[1], height[1]) if best_size is None else (_one(text, span) for span in best_size)
    return Profile(
        name=name,
        width=Span(width[0], best_width, width[1]),
        height=Span(height[0], best_height, height[1]),
        images=Span(fewest, fewest if best_images is None else _one(text, best_images), most),
        guidance=guidance,
    )


def default_profile(manifest: Manifest) -> Profile:
    """One picture of the bundle's default size."""
    width, height = manifest.defaults.width, manifest.defaults.height
    return Profile(f"{width}x{height}", Span(width, width, width), Span(height, height, height), images=Span(1, 1, 1))


def check_profiles(profiles: Sequence[Profile], manifest: Manifest, components: Iterable[str]) -> None:
    """Check names and sizes against those models of a bundle.

    Raises:
        ArgumentError: two profiles of one name or of the same calls, or a side that is no multiple of what the models
            take.
    """
    names = [profile.name for profile in profiles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ArgumentError("--profile", "a name given twice", got=twice, expected="every name once")
    by_calls: dict[Profile, str] = {}
    for profile in profiles:
        first = by_calls.setdefault(replace(profile, name=""), profile.name)
        if first != profile.name:
            raise ArgumentError(f"--profile {profile.name}", f"the same calls as --profile {first}", got=str(profile),
                                expected="every profile once")  # fmt: skip
    multiple = _side_multiple(manifest, components)
    for profile in profiles:
        for axis, span in (("width", profile.width), ("height", profile.height)):
            for pixels in (span.minimum, span.optimum, span.maximum):
                if pixels % multiple:
                    nearest = max(round(pixels / multiple), 1) * multiple
                    raise ArgumentError(
                        f"--profile {profile.name}",
                        axis,
                        got=pixels,
                        expected=f"a multiple of {multiple} pixels",
                        remedy=f"Use {nearest}.",
                    )


def input_ranges(name: str, component: Component, manifest: Manifest, profile: Profile) -> dict[str, InputRange]:
    """The shapes of every input of component `name` at a profile's smallest, best and largest call.

    Text encoders, decoders and encoders of pictures run one text or picture per call, as the runtime calls them.

    Raises:
        ArgumentError: the profile is outside the model: an axis of it is fixed at another size.
        BundleError: an input's shape does not follow from the profile.
    """
    points = profile.points(guided_by_default=guided_by_default(manifest, component))
    smallest, best, largest = (_input_shapes(name, component, manifest, profile, point) for point in points)
    return {
        spec.name: InputRange(min=smallest[spec.name], opt=best[spec.name], max=largest[spec.name])
        for spec in component.inputs
    }


def guided_by_default(manifest: Manifest, component: Component) -> bool:
    """Whether a denoiser runs both branches of guidance where a request says nothing of it."""
    return manifest.defaults.guidance_scale > 1 and spec_of(component.inputs, GUIDANCE_EMBEDDING) is None


def _side_multiple(manifest: Manifest, components: Iterable[str]) -> int:
    """What a picture's sides must be multiples of, in pixels."""
    return manifest.latent.downsampling * max(manifest.components[name].spatial_multiple for name in components)


def _input_shapes(
    name: str, component: Component, manifest: Manifest, profile: Profile, point: Point
) -> dict[str, Shape]:
    sizes: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    for spec in component.inputs:
        for axis, size in _axes(name, component, manifest, point, spec):
            stated = spec.shape[axis]
            if isinstance(stated, str):
                sizes.setdefault(stated, size)
            # What an input is given on this axis, whatever its symbol is called elsewhere.
            shapes[spec.name] = _put(shapes.get(spec.name, ()), spec, axis, size, f"{name} in --profile {profile.name}")
    for spec in component.inputs:
        given = shapes.get(spec.name, (0,) * len(spec.shape))
        known = [size or stated for size, stated in zip(given, spec.shape, strict=True)]
        shape = evaluated(known, sizes)
        if shape is None:
            raise BundleError(name, f"shape of input {spec.name!r}", got=spec.shape,
                              expected=f"numbers and formulas of {', '.join(sizes)}")  # fmt: skip
        shapes[spec.name] = shape
    return shapes


def _axes(
    name: str, component: Component, manifest: Manifest, point: Point, spec: TensorSpec
) -> Iterator[tuple[int, int]]:
    """The axes of an input whose sizes follow from its role in the model: axis and size."""
    both = component.role in ("denoiser", "controlnet")
    seen = _SEEN.get(component.role, ())
    if isinstance(spec.shape[0], str) and spec.name in (*_BATCHED, *seen):
        yield 0, point.images * (1 + point.guided) if both else 1
    if spec.name in _SEQUENCES:
        encoders = manifest.text.encoders
        yield 1, encoders[name].max_length if name in encoders else manifest.text.max_length
    if spec.name in seen:
        scale = 1 if component.role == "vae_encoder" else manifest.latent.downsampling
        yield 2, point.height // scale
        yield 3, point.width // scale


def _put(shape: Shape, spec: TensorSpec, axis: int, size: int, where: str) -> Shape:
    stated = spec.shape[axis]
    if isinstance(stated, int) and stated != size:
        remedy = "Give the size the model was exported for, or export it with symbolic sizes."
        raise ArgumentError(where, f"axis {axis} of {spec.name}", got=size, expected=str(stated), remedy=remedy)
    shape = shape or (0,) * len(spec.shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def _sizes(text: str, size: str) -> tuple[tuple[int, int], tuple[int, int]]:
    found = _SIZE.fullmatch(size.strip().lower())
    if found is None:
        raise _unreadable(text, size)
    width = int(found[1]), int(found[2] or found[1])
    return width, (int(found[3]), int(found[4] or found[3])) if found[3] else width


def _counts(text: str, part: str) -> tuple[int, int]:
    found = _COUNT.fullmatch(part)
    if found is None:
        raise _unreadable(text, part)
    return int(found[1]), int(found[2] or found[1])


def _one(text: str, span: tuple[int, int]) -> int:
    if span[0] != span[1]:
        raise ArgumentError("--profile", "a range after opt=", got=text, expected="one size, one number of pictures")
    return span[0]


def _unreadable(text: str, part: str) -> ArgumentError:
    what = "not a profile" if part == text else f"{part!r} is no part of a profile"
    return ArgumentError("--profile", what, got=text[:200], expected=EXPECTED)
