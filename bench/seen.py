"""What was seen of contenders' turns besides their times, as figures and columns of a section."""

from __future__ import annotations

from collections.abc import Iterable

from .probes import ENERGY, GPU_MIB, GPUS_J, PROCESSORS_J
from .reports.schema import Column, Figure, Row
from .rounds import Taken

_TITLES = {
    PROCESSORS_J: "J of all processors",
    GPUS_J: "J of all GPUs",
    GPU_MIB: "peak GPU memory, MiB",
}
NOTE = (
    " Energy is all that the processors or the GPUs took from the order to the saved picture, whatever ran there: "
    "contenders that wait take some of it."
)


def seen_figures(taken: Taken) -> dict[str, Figure]:
    """Energy by round, and the peak of memory on GPUs, where every round told them."""
    figures = {name: Figure(unit="J", samples=taken.samples(name)) for name in ENERGY if taken.tells(name)}
    if taken.tells(GPU_MIB):
        figures[GPU_MIB] = Figure(unit="MiB", samples=(max(taken.samples(GPU_MIB)),))
    return figures


def seen_columns(rows: Iterable[Row]) -> tuple[Column, ...]:
    """The columns of what any row has of it."""
    told = {name for row in rows for name in row.figures}
    return tuple(Column(of=name, title=title) for name, title in _TITLES.items() if name in told)


def seen_note(rows: Iterable[Row]) -> str:
    """What a section's note says of it besides; empty where there is none."""
    return NOTE if any(name in row.figures for row in rows for name in ENERGY) else ""
