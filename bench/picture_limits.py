"""What a picture cannot take less than, part by part, by what the machine was seen to do at best."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

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
# What they may differ by before and after the contenders' rounds without being told first.
STEADY = 0.10
Answer = TypeVar("Answer")


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

    measured: the rates before the contenders' rounds, and after them; the better of each is what counts.
    text: a prompt, through all encoders. decode: one picture. rows: by denoiser one with one branch of guidance, and
    one with both; of all pictures of a call. calls: of every model, one such call.
    """

    measured: tuple[Rates, Rates]
    text: Least
    decode: Least
    rows: Mapping[str, tuple[Least, Least]] = field(default_factory=dict)
    calls: Mapping[str, Least] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """What the machine does at best."""
        return self.measured[0].best(self.measured[1])

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


def rates_by_target(
    work: Work, targets: Iterable[str], options: Options, progress: Progress
) -> tuple[dict[str, Rates], tuple[str, ...]]:
    """What the machine does at best on each target, before anything else runs; and why others are not told."""
    return _on_each(targets, progress, lambda target: _asked(target, measured_on, work, parse_target(target), options))


def limits_by_target(
    work: Work, before: Mapping[str, Rates], options: Options, progress: Progress, *, guided: bool
) -> tuple[dict[str, PictureLimits], tuple[str, ...]]:
    """The limits on each target, after the contenders' rounds; why others have none, and what was not steady.

    before: what `rates_by_target` found. guided: whether rows run both branches of guidance.
    """

    def asked(target: str) -> PictureLimits | str:
        return _asked(target, measured_limits, work, parse_target(target), before[target], options, guided)

    limits, untold = _on_each(before, progress, asked)
    return limits, (*untold, *(told for target, one in limits.items() for told in _unsteady(target, one)))


def _on_each(
    targets: Iterable[str], progress: Progress, ask: Callable[[str], Answer | str]
) -> tuple[dict[str, Answer], tuple[str, ...]]:
    """Answers by target, one after the other; and why others have none."""
    answers, untold, named = {}, [], tuple(targets)
    for done, target in enumerate(named):
        progress("what the machine does at best", done, len(named))
        found = ask(target)
        if isinstance(found, str):
            untold.append(f"The limit is not told on {target}: {found}")
        else:
            answers[target] = found
    if named:
        progress("what the machine does at best", len(named), len(named))
    return answers, tuple(untold)


def _asked(target: str, function: Callable[..., Answer], *arguments: object) -> Answer | str:
    """What a function returns in a process of its own, or why it cannot be told on a target."""
    backend = parse_target(target).backend
    if backend in ENGINES_ONLY:
        return f"{backend} runs no graphs, as the products are."
    try:
        return in_fresh_process(function, *arguments)
    except TandemError as error:
        return str(error)


def _unsteady(target: str, limits: PictureLimits) -> Iterator[str]:
    before, after = (one.every for one in limits.measured)
    moved = [
        f"{name} {rate / 1e9:,.3g} before the rounds, {after[name] / 1e9:,.3g} after"
        for name, rate in before.items()
        if max(rate, after[name]) > (1 + STEADY) * min(rate, after[name])
    ]
    if moved:
        yield (
            f"What the machine does at best on {target} was not steady: {'; '.join(moved)} (GFLOP/s, GB/s). Shares of "
            "the limit are of the better, which may still be less than the machine can do."
        )


def measured_on(work: Work, target: Target, options: Options) -> Rates:
    """What the machine does at best on a target, measured here; raises as `measured_rates`, and BundleError."""
    return measured_rates(target, ("fp32", *_computed_in(Bundle.open(work.bundle), work, target).values()), options)


def measured_limits(work: Work, target: Target, before: Rates, options: Options, guided: bool) -> PictureLimits:
    """The limits on a target, measured here once more; raises as `measured_on`."""
    bundle = Bundle.open(work.bundle)
    computed_in = _computed_in(bundle, work, target)
    measured = (before, measured_on(work, target, options))
    rates = before.best(measured[1])
    size, pictures = f"{work.width}x{work.height}", work.arguments["num_images_per_prompt"]

    def least(name: str, profile: str) -> Least:
        needed = work_of(bundle, name, call_shapes(bundle, name, profile), computed_in[name])
        return Least(needed.flops, max(needed.flops / rates.flops[computed_in[name]], needed.bytes / rates.bytes))

    rows = {}
    for name in dict(work.steps):
        one = least(name, f"{size}:b{pictures}:unguided")
        rows[name] = (one, least(name, f"{size}:b{pictures}:guided") if guided else one)
    calls = {name: least(name, f"{size}:unguided") for name in computed_in if name not in rows}
    texts = bundle.manifest.names("text_encoder")
    return PictureLimits(
        measured=measured,
        text=sum((calls[name] for name in texts), Least()),
        decode=next(one for name, one in calls.items() if name not in texts),
        rows=rows,
        calls={**calls, **{name: both for name, (_, both) in rows.items()}},
    )


def _computed_in(bundle: Bundle, work: Work, target: Target) -> dict[str, str]:
    """What the models of a picture compute in on a target, by name."""
    decoder = work.decoder or bundle.manifest.names("vae_decoder")[0]
    names = (*bundle.manifest.names("text_encoder"), *dict(work.steps), decoder)
    return {name: str(target.of_component(bundle.component(name)).precision) for name in names}
