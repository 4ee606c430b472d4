"""Adaptive guidance: rows whose branches agree run one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import did_you_mean, finite_number, whole_number
from .errors import RequestError

Float32 = npt.NDArray[np.float32]
_WHERE = "guidance_config"
_THRESHOLD, _RELEASE = 0.05, 1.5


@dataclass(frozen=True, slots=True)
class AdaptiveRule:
    """When guidance is switched off, and on again, by the branches' discrepancy (`relative_mae`).

    A row below `threshold` is the last before rows that run the conditional branch alone, where the branches'
    difference is steady too: since the row with both before it, it has become less than `steady` times as large a row,
    and no less small. Every `probe`-th row from there runs both again, to look: guidance comes back where they are
    `release` or more apart, or their difference is not steady, and with another denoiser. Two limits keep it from
    switching to and fro about one.

    Hybridiff's slope tells when the discrepancy has stopped falling, not how large it is: branches that stay far apart
    have a slope of 0 too. Distance alone does not do either: the first rows are often near each other, and a difference
    that grows from there decides the picture.
    """

    threshold: float = _THRESHOLD
    release: float = _THRESHOLD * _RELEASE
    probe: int = 4
    steady: float = 1.25

    @classmethod
    def of(cls, config: object, default: AdaptiveRule | None = None) -> AdaptiveRule:
        """`default`, or the numbers above, with what `config`, a mapping or None, says otherwise.

        Raises:
            RequestError: it is no mapping, has an unknown key, or a value that cannot be.
        """
        names = [field.name for field in fields(cls)]
        if config is not None and not isinstance(config, Mapping):
            raise RequestError(_WHERE, "type", got=config, expected=f"keys and values of {', '.join(names)}")
        given: dict[str, Any] = dict(config or {})
        for name, value in given.items():
            if name not in names:
                expected, remedy = f"one of {', '.join(names)}", did_you_mean(str(name)[:80], names)
                raise RequestError(_WHERE, "unknown key", got=name, expected=expected, remedy=remedy)
            if name == "probe":
                if (whole_number(value) or 0) < 2:
                    raise RequestError(f"{_WHERE}: probe", "rows", got=value, expected="a whole number, 2 or more")
            elif (finite_number(value) or 0.0) <= (name == "steady"):
                what, least = ("change from row to row", 1) if name == "steady" else ("discrepancy", 0)
                raise RequestError(f"{_WHERE}: {name}", what, got=value, expected=f"a number above {least}")
        base = cls() if default is None else default
        # A threshold alone moves the release with it.
        if "threshold" in given and "release" not in given:
            given["release"] = base.release / base.threshold * given["threshold"]
        rule = replace(base, **given)
        if rule.release < rule.threshold:
            expected = f"threshold, {rule.threshold:g}, or more"
            raise RequestError(f"{_WHERE}: release", "discrepancy", got=rule.release, expected=expected)
        return rule


class Agreement:
    """Which rows of one generation run both branches under a rule, by what those that did found.

    skipped: how many rows without the unconditional branch have passed since one with both.
    """

    def __init__(self, rule: AdaptiveRule) -> None:
        self.why, self.skipped = "guided", 0
        self._rule = rule
        self._denoiser = ""
        self._agree = False
        self._discrepancy = 0.0

    def wanted(self, denoiser: str) -> bool:
        """Whether the row at hand, of this denoiser, is to run both branches; `why` then says why."""
        if denoiser != self._denoiser:
            self._denoiser, self._agree = denoiser, False
        if not self._agree:
            self.why = "guided"
        elif self.skipped + 1 >= self._rule.probe:
            self.why = "guided to see whether the branches still agree"
        else:
            self.why = f"the branches agree: they were {self._discrepancy:.3g} apart"
            return False
        return True

    def saw(self, discrepancy: float, growth: float | None) -> None:
        """Remember a row with both branches: how far they were apart, and what their difference grew by, a row.

        growth: since the row with both before it; None where this denoiser had none.
        """
        limit = self._rule.release if self._agree else self._rule.threshold
        steady = growth is not None and 1 / self._rule.steady < growth < self._rule.steady
        self._agree, self.skipped, self._discrepancy = discrepancy < limit and steady, 0, discrepancy


class AdaptiveGuidance:
    """Guidance of one generation under a rule.

    In a row without unconditional branch the branches' last difference stands for its own, which goes on growing or
    shrinking as it last did.

    growth: the factor a row by which it did so in the last row with both branches; None in a denoiser's first.
    """

    def __init__(self, rule: AdaptiveRule) -> None:
        self.growth: float | None = None
        self._agreement = Agreement(rule)
        self._denoiser = ""
        self._seen = False
        self._difference: Float32 | None = None
        self._buffers: list[Float32] = []

    @property
    def why(self) -> str:
        return self._agreement.why

    def wanted(self, denoiser: str) -> bool:
        """See `Agreement`."""
        if denoiser != self._denoiser:
            self._denoiser, self._seen = denoiser, False
        return self._agreement.wanted(denoiser)

    def saw(self, conditional: Float32, unconditional: Float32, discrepancy: float) -> None:
        """Remember both branches of a row."""
        former = self._difference
        self._buffers = self._buffers[::-1] or list(np.empty((2, *conditional.shape), np.float32))
        self._difference = latter = np.subtract(conditional, unconditional, out=self._buffers[0])
        size = along = 0.0
        if self._seen and former is not None:
            size, along = float(np.vdot(former, former)), float(np.vdot(former, latter))
        self.measured(discrepancy, size, along)

    def measured(self, discrepancy: float, size: float, along: float) -> None:
        """Remember what was measured of a row with both branches.

        size, along: the scalar products of the difference before with itself and with this row's; of a denoiser's first
            row any numbers.
        """
        self.growth = _growth(size, along, self._agreement.skipped + 1) if self._seen else None
        self._seen = True
        self._agreement.saw(discrepancy, self.growth)

    def guide(self, prediction: Float32, guidance_scale: float, scratch: Float32) -> None:
        """Make the guided prediction of a row, in place, from its conditional branch alone."""
        weight = self.weight(guidance_scale)
        if self._difference is not None and weight:
            np.multiply(self._difference, weight, out=scratch)
            np.add(prediction, scratch, out=prediction)

    def weight(self, guidance_scale: float) -> float:
        """How often the last difference is added to the conditional branch in a row that has no other; call it once."""
        self._agreement.skipped += 1
        return 0.0 if self.growth is None else (guidance_scale - 1) * self.growth**self._agreement.skipped


def _growth(size: float, along: float, rows: int) -> float:
    """By what factor a row a difference has grown along itself in so many rows; 0 where it has turned round."""
    return max(along / size, 0.0) ** (1 / rows) if size else 1.0
