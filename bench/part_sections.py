"""What a picture's time goes to, beside what the machine can do at best, as sections of a report."""

from __future__ import annotations

from collections.abc import Mapping

from .graph_work import ABOVE_NOTE, BYTES_NOTE
from .picture_limits import SIDE, Least, PictureLimits
from .rates import CHAIN
from .reports.schema import Column, Figure, Row, Section
from .reports.told import number
from .rounds import Taken

_PARTS = {"text_s": "text encoders", "decode_s": "decoder", "host_s": "the loop itself"}


def parts_section(taken: Mapping[str, Taken], limits: Mapping[str, PictureLimits], pictures: int) -> Section:
    """The parts of contenders that tell them. limits: by contender. pictures: how many a call paints."""
    rows = []
    for name, one in taken.items():
        least = _least(one, limits.get(name), pictures)
        for part in one.parts:
            if part.endswith("_s") and part != "total_s":
                figures = _part_figures(one, part, [each.get(part) for each in least])
                rows.append(Row(name=f"{name}: {_PARTS.get(part, part.removesuffix('_s'))}", figures=figures))
    of_limits = (Column(of="limit", title="of the limit"),) if limits else ()
    return Section(
        key="parts",
        title="Where the time goes",
        columns=(
            Column(of="ms", title="ms a call", shown="percentiles"),
            Column(of="share", title="share of the call"),
            *of_limits,
        ),
        rows=tuple(rows),
        note="A denoiser's time is that of all its rows in a call of the pipeline; the loop itself is what these take "
        "besides: guidance, solver, noise. TandemRT keeps the latest texts that it encoded: guidance's empty one, the "
        "same in every round, is encoded for the first picture alone." + (LIMIT_NOTE if limits else ""),
    )


LIMIT_NOTE = (
    f" A part takes no less than its operations at the rate of products, nor than its bytes ({BYTES_NOTE}, once a row) "
    "at that of copies, both as measured on this machine: the slower of the two is its limit. "
    f"{ABOVE_NOTE}"
)


def peaks_section(limits: Mapping[str, PictureLimits]) -> Section:
    """What the machine does at best through each backend. limits: by contender or target."""
    rows = []
    for name, one in limits.items():
        for of, rate in one.rates.every.items():
            before, after = (number(each.every[of] / 1e9) for each in one.measured)
            best = (rate / 1e9,)
            figures = {"gflops": Figure(unit="GFLOP/s", samples=best)}
            if of == "copies":
                figures = {"gbytes": Figure(unit="GB/s", samples=best)}
            rows.append(Row(name=f"{name}: {of}", words={"measured": f"{before}, {after}"}, figures=figures))
    return Section(
        key="peaks",
        title="What the machine does at best",
        columns=(
            Column(of="gflops", title="GFLOP/s"),
            Column(of="gbytes", title="GB/s"),
            Column(of="measured", title="before the rounds, after", shown="words"),
        ),
        rows=tuple(rows),
        note=f"A chain of {CHAIN} products of matrices of {SIDE} x {SIDE}, and a copy of a large array, through the "
        "same backend on as many threads: the best of some rounds before the contenders were opened, and of as many "
        "after they ended. The better of both is what shares of the limit are of.",
    )


def _least(taken: Taken, limits: PictureLimits | None, pictures: int) -> list[dict[str, Least]]:
    """What each round's parts took at least, by the name of their seconds."""
    return [{} if limits is None else limits.parts(answer.figures, pictures) for answer in taken.rounds]


def _part_figures(taken: Taken, part: str, least: list[Least | None]) -> dict[str, Figure]:
    samples = taken.samples(part)
    shares = tuple(value / total for value, total in zip(samples, taken.samples("total_s"), strict=True))
    figures = {
        "ms": Figure(unit="ms", samples=tuple(1e3 * value for value in samples)),
        "share": Figure(unit="share", samples=shares),
    }
    known = [(one, value) for one, value in zip(least, samples, strict=True) if one is not None and value > 0]
    if len(known) == len(samples):
        figures["gflops"] = Figure(unit="GFLOP/s", samples=tuple(one.flops / value / 1e9 for one, value in known))
        figures["limit"] = Figure(unit="limit", samples=tuple(one.seconds / value for one, value in known))
    return figures
