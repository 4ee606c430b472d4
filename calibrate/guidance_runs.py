"""Prompts painted with full guidance and with less, one a call: pictures compared, branches counted, rows timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np

from ..runtime import Output, Pipeline
from ..runtime.plan import RowGuidance
from .curves import ALWAYS, Curve
from .guidance_loss import Painted
from .ledger import Ledger
from .quality import Pixels, Scorer, psnr_db

_IN_FULL: Mapping[str, Any] = {"guidance_interval": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Timed:
    """A picture beside the one with full guidance, and how long the rows of both took."""

    painted: Painted
    denoise_ms: float
    full_ms: float

    @property
    def ratio(self) -> float:
        return self.denoise_ms / self.full_ms


@dataclass(frozen=True, slots=True)
class Series:
    """Prompts, of which the one at index i has `seed` + i, and what they are called in a ledger."""

    name: str
    prompts: tuple[str, ...]
    seed: int

    def __len__(self) -> int:
        return len(self.prompts)


class Painter:
    """Paints a series; what was painted before comes out of `ledger`.

    arguments: of every request. scorer: says of a picture whether it shows its prompt; None where nobody does.
    """

    def __init__(
        self,
        pipe: Pipeline,
        series: Series,
        arguments: Mapping[str, Any],
        ledger: Ledger,
        scorer: Scorer | None = None,
    ) -> None:
        self.series = series
        self._pipe, self._arguments, self._ledger, self._scorer = pipe, arguments, ledger, scorer
        self._full: dict[int, tuple[Pixels, bool | None]] = {}
        self._warm: tuple[str, ...] = ()

    def curve(self, index: int) -> Curve:
        """The discrepancy curve of a prompt."""
        key = f"{self.series.name} curve {index}"
        if (known := self._ledger.get(key)) is not None:
            return msgspec.convert(known, Curve)
        _, curve = self._recorded(index)
        self._ledger.put(key, msgspec.to_builtins(curve))
        return curve

    def painted(self, way: str, arguments: Mapping[str, Any], index: int) -> Painted:
        """A prompt with these arguments too; way: their name in the ledger."""
        key = f"{self.series.name} {way}: {index}"
        if (known := self._ledger.get(key)) is not None:
            return Painted(**known)
        full = self._full.get(index) or self._recorded(index)[0]
        made = self._compared(self._paint(index, arguments), full, index)
        self._ledger.put(key, asdict(made))
        return made

    def timed(self, ways: Mapping[str, Mapping[str, Any]], index: int) -> dict[str, Timed]:
        """A prompt in every way, in turns with full guidance as a request has it that says nothing of it.

        Each way is taken once before, untimed: it loads models and binds what they are given.
        """
        key = f"{self.series.name} timed {', '.join(ways)}: {index}"
        known = self._ledger.get(key)
        if known is None:
            for arguments in () if self._warm == tuple(ways) else (_IN_FULL, *ways.values()):
                self._paint(index, arguments)
            self._warm = tuple(ways)
            full = self._paint(index, _IN_FULL)
            reference = self._seen(full, index)
            known = {}
            for way, arguments in ways.items():
                made = self._paint(index, arguments)
                painted = asdict(self._compared(made, reference, index))
                known[way] = [painted, made.timings.denoise_ms, full.timings.denoise_ms]
            self._ledger.put(key, known)
        return {way: Timed(Painted(**painted), *spent) for way, (painted, *spent) in known.items()}

    def _recorded(self, index: int) -> tuple[tuple[Pixels, bool | None], Curve]:
        output = self._paint(index, {"guidance": "adaptive", "guidance_config": ALWAYS})
        full = self._full[index] = self._seen(output, index)
        return full, Curve.of(output.plan.ran, output.plan.denoisers)

    def _paint(self, index: int, arguments: Mapping[str, Any]) -> Output:
        return self._pipe(self.series.prompts[index], seed=self.series.seed + index, **self._arguments, **arguments)

    def _seen(self, output: Output, index: int) -> tuple[Pixels, bool | None]:
        pixels = np.asarray(output.images[0])
        right = None if self._scorer is None else bool(self._scorer([self.series.prompts[index]], pixels[None])[0])
        return pixels, right

    def _compared(self, output: Output, full: tuple[Pixels, bool | None], index: int) -> Painted:
        pixels, right = self._seen(output, index)
        return Painted(psnr_db(pixels, full[0]), branches_run(output.plan.ran), right, full[1])


def branches_run(rows: Sequence[RowGuidance]) -> int:
    """How many times a branch of the denoiser ran: twice in a guided row, and in the row that fills a window."""
    return sum({"held": 0, "filling": 2}.get(row.placement, 1 + row.guided) for row in rows)
