"""A report as it is kept: JSON whose shape these structs are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from tandemrt.runtime.errors import BenchmarkError

from ..figures import write_json

FORMAT = "tandemrt.bench/1"
Unit = Literal[
    "ms", "s", "us", "images/s", "MiB", "MB", "J", "dB", "share", "limit", "times", "GFLOP", "GFLOP/s", "GB/s", "count"
]
TIMES: frozenset[Unit] = frozenset({"ms", "s", "us", "times"})
# Of what follows from how long something took, and is as noisy, and as slow on a busy machine.
TIMED: frozenset[Unit] = TIMES | {"images/s", "GFLOP/s", "GB/s", "limit", "J"}
MORE_IS_BETTER: frozenset[Unit] = frozenset({"images/s", "dB", "limit", "GFLOP/s", "GB/s"})
# Told as percentages: of a whole, and of what the machine can do at best.
SHARES: frozenset[Unit] = frozenset({"share", "limit"})
# Of fewer rounds the 10th and 90th percentile, between the outer two at each end, would hide what they differ by.
FEW_ROUNDS = 5
Samples = npt.NDArray[np.float64]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Immutable and without unknown fields."""


class Figure(_Record, frozen=True, kw_only=True):
    """What was measured: a sample for each round that counts, in their order, or one where it is taken once."""

    unit: Unit
    samples: Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]

    @property
    def values(self) -> Samples:
        """The samples, (rounds,) float64."""
        return np.array(self.samples)

    def at(self, percent: float) -> float:
        """A percentile, between samples where it falls there."""
        return float(np.percentile(self.values, percent))

    @property
    def median(self) -> float:
        return self.at(50)

    @property
    def spread(self) -> tuple[float, float, float]:
        """The 10th, the 50th and the 90th percentile; of few rounds, and of PSNR, the least, median and greatest."""
        whole = len(self.samples) < FEW_ROUNDS or self.unit == "dB"
        low, high = (0, 100) if whole else (10, 90)
        return self.at(low), self.median, self.at(high)


class Row(_Record, frozen=True, kw_only=True):
    """A contender or a component: what is told of it in words, and its figures, each by its column.

    failed: why there are no figures; otherwise empty.
    """

    name: str
    words: Mapping[str, str] = {}
    figures: Mapping[str, Figure] = {}
    failed: str = ""


class Column(_Record, frozen=True, kw_only=True):
    """What a table shows of a row.

    of: the figure or the words. shown: a figure's median with its spread; its 50th, 90th and 99th percentile;
        or how its samples compare with the baseline's of the same round, as a quotient.
    """

    of: str
    title: str
    shown: Literal["words", "median", "percentiles", "ratio"] = "median"


class Plot(_Record, frozen=True, kw_only=True):
    """A chart of a section's rows: bars of `y`, or points at `x` and `y` with a line through those no other beats."""

    title: str
    y: str
    x: str = ""


class Section(_Record, frozen=True, kw_only=True):
    """A table of a report, with charts.

    baseline: the row that ratios are to. note: what the reader has to know of how it was measured, in Markdown.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    baseline: str = ""
    plots: tuple[Plot, ...] = ()
    note: str = ""

    def row(self, name: str) -> Row | None:
        """The row of this name, where there is one."""
        return next((row for row in self.rows if row.name == name), None)

    def ratios(self, row: Row, figure: str) -> Figure | None:
        """A row's figure by the baseline's, round by round; None where one of them has not got it in every round."""
        base = self.row(self.baseline)
        if base is None or figure not in row.figures or figure not in base.figures:
            return None
        own, other = row.figures[figure].values, base.figures[figure].values
        return Figure(unit="times", samples=tuple((own / other).tolist())) if own.shape == other.shape else None


class Machine(_Record, frozen=True, kw_only=True):
    """What it was measured on; see `machine.machine_facts`.

    clock_mhz: the median at the ends of the first half of all turns, and of the last half; where nothing has turns,
        before and after; None where the system does not tell. load_average: of the minute before it began, and of the
        last one.
    other_cores: how many cores other work had on average while it was measured, what a hypervisor withheld among it;
        None where the system does not tell. energy: what counters of it count, and why others are not told.
    """

    processor: str
    cores: int
    memory_gib: float | None
    devices: tuple[Mapping[str, str], ...]
    system: str
    python: str
    versions: Mapping[str, str]
    clock_mhz: tuple[float | None, float | None]
    load_average: tuple[float, float]
    other_cores: float | None = None
    energy: str = ""


class Method(_Record, frozen=True, kw_only=True):
    """How it was measured: rounds before the first that counts, rounds that count, and who ran when in a round."""

    warm_up: int
    rounds: int
    order: str
    seed: int
    threads: int | None


class Subject(_Record, frozen=True, kw_only=True):
    """A bundle that was measured: its folder's name, its digest and what made it, the sizes of its models' files.

    random_weights: whether it is known to hold no trained weights, so that its pictures show nothing.
    """

    name: str
    digest: str
    random_weights: bool
    file_mb: Mapping[str, float]


class Report(_Record, frozen=True, kw_only=True):
    """A run of `tandemrt bench`.

    began: UTC, ISO 8601. request: what was asked for, argument by argument. caveats: what the reader is to know before
    any figure, a sentence each.
    """

    format: Literal["tandemrt.bench/1"] = FORMAT
    title: str
    began: str
    request: Mapping[str, str]
    machine: Machine
    method: Method
    subjects: tuple[Subject, ...]
    sections: tuple[Section, ...]
    caveats: tuple[str, ...]

    def section(self, key: str) -> Section | None:
        """The section of this key, where there is one."""
        return next((section for section in self.sections if section.key == key), None)


def write_report_json(path: Path, report: Report) -> None:
    """Write a report as JSON, whole or not at all.

    Raises:
        ValueError: a figure is NaN or infinite.
        OSError: as `write_json`.
    """
    facts: dict[str, Any] = msgspec.to_builtins(report)
    write_json(path, {"format": FORMAT, **facts})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a report's file, which the repository keeps as `report.schema.json`."""
    return msgspec.json.schema(Report)


def read_report(path: Path) -> Report:
    """The report in a file.

    Raises:
        BenchmarkError: it cannot be read, or is none of this format.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise BenchmarkError(str(path), f"cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        expected = f"the JSON of `tandemrt bench`, format {FORMAT}"
        raise BenchmarkError(str(path), f"is no report ({error})", expected=expected) from error
