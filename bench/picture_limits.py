"""What a picture cannot take less than, part by part, by what the machine was seen to do at best."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import TandemError
from tandemrt.runtime.targets import ENGINES_ONLY, Target, parse_target

from .entrants import Work
from .graph_work import call_shapes, work_of
from .memory import in_fresh_process
from .rates import Options, Rates, measured_rates
from .rounds import Progress

# Of the products and copies: a second or two of two cores each, in one round that goes before and three that count.
SIDE, COPIED, WARM_UP, REPEATS = 2048, 1 << 26, 1, 3


@dataclass(frozen=True, slots=True)
class Least:
    """Floating-point operations, and the seconds that they and the bytes they need take at least."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Least) -> Least:
        return Least(self.flops + other.flops, self.seconds + other.seconds)

    def __mul__(self, count: float) -> Least:
        return Least(self.flops * count, self.seconds * count)


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """The machine's rates, and what follows for parts of a picture on a target.

    text: a prompt, through all encoders. decode: one picture. rows: by denoiser one with one branch of guidance, and
    one with both; of all pictures of a call. calls: of every model, one such call.
    """

    rates: Rates
    text: Least
    decode: Least
    rows: Mapping[str, tuple[Least, Least]] = field(default_factory=dict)
    calls: Mapping[str, Least] = field(default_factory=dict)

    def parts(self, figures: Mapping[str, float], pictures: int) -> dict[str, Least]:
        """Of a call that told these figures, by the name of the part's seconds. pictures: how many it painted."""
        parts = {"text_s": self.text, "decode_s": self.decode * pictures}
        for name, (one, both) in self.rows.items():
            guided = figures.get(f"{name}_guided", 0)
            parts[f"{name}_s"] = both * guided + one * (figures.get(f"{name}_rows", 0) - guided)
        return parts

    def flops(self, figures: Mapping[str, float], pictures: int) -> float:
        """The operations of the whole call."""
        return sum(part.flops for part in self.parts(figures, pictures).values())


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Declare --no-limits, of benchmarks that measure what the machine does at best unless they are told not to."""
    what = "leave out what the machine does at best, which takes some seconds a target"
    parser.add_argument("--no-limits", dest="limits", action="store_false", help=what)


def machine_options(threads: int | None) -> Options:
    """How the machine is measured."""
    return Options(SIDE, COPIED, threads, WARM_UP, REPEATS)


def limits_by_target(
    work: Work, targets: Iterable[str], options: Options, progress: Progress, *, guided: bool
) -> tuple[dict[str, PictureLimits], tuple[str, ...]]:
    """The limits on each target, measured one after the other in processes of their own; and why others have none.

    guided: whether rows run both branches of guidance.
    """
    limits, untold, named = {}, [], tuple(targets)
    if not named:
        return {}, ()
    for done, target in enumerate(named):
        progress("what the machine does at best", done, len(named))
        found = _in_own_process(work, target, options, guided)
        if isinstance(found, PictureLimits):
            limits[target] = found
        else:
            untold.append(f"The limit is not told on {target}: {found}")
    progress("what the machine does at best", len(named), len(named))
    return limits, tuple(untold)


def _in_own_process(work: Work, target: str, options: Options, guided: bool) -> PictureLimits | str:
    """The limits on a target, or why there are none."""
    parsed = parse_target(target)
    if parsed.backend in ENGINES_ONLY:
        return f"{parsed.backend} runs no graphs, as the products are."
    try:
        return in_fresh_process(measured_limits, work, parsed, options, guided)
    except TandemError as error:
        return str(error)


def measured_limits(work: Work, target: Target, options: Options, guided: bool) -> PictureLimits:
    """The limits on a target, measured here; raises as `measured_rates`, and BundleError."""
    bundle = Bundle.open(work.bundle)
    decoder = work.decoder or bundle.manifest.names("vae_decoder")[0]
    texts, denoisers = bundle.manifest.names("text_encoder"), tuple(dict(work.steps))
    computed_in = {
        name: str(target.of_component(bundle.component(name)).precision) for name in (*texts, *denoisers, decoder)
    }
    rates = measured_rates(target, ("fp32", *computed_in.values()), options)
    size, pictures = f"{work.width}x{work.height}", work.arguments["num_images_per_prompt"]

    def least(name: str, profile: str) -> Least:
        needed = work_of(bundle, name, call_shapes(bundle, name, profile), computed_in[name])
        return Least(needed.flops, max(needed.flops / rates.flops[computed_in[name]], needed.bytes / rates.bytes))

    rows = {}
    for name in denoisers:
        one = least(name, f"{size}:b{pictures}:unguided")
        rows[name] = (one, least(name, f"{size}:b{pictures}:guided") if guided else one)
    calls = {name: least(name, f"{size}:unguided") for name in (*texts, decoder)}
    return PictureLimits(
        rates=rates,
        text=sum((calls[name] for name in texts), Least()),
        decode=calls[decoder],
        rows=rows,
        calls={**calls, **{name: both for name, (_, both) in rows.items()}},
    )
