"""What leaving calls out may cost in quality, and which settings cost it: a walk from the cheapest setting on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .guidance_candidates import Candidate

# Beyond the loss that is allowed by so much, better settings are of no use to anybody.
_ENOUGH_DB = 20.0
# What a dearer setting has to be better by: less is no reason to pay more.
_BETTER_DB = 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """What is allowed, of the same prompts painted with full guidance from the same noise; either may be absent.

    min_psnr_db: the PSNR of the mean of the pictures' squared errors. max_lost: by how much the share of pictures that
    show their prompt may be lower.
    """

    min_psnr_db: float | None
    max_lost: float | None


@dataclass(frozen=True, slots=True)
class Painted:
    """One picture beside the one with full guidance: runs of one branch it took, and whether either is right."""

    psnr_db: float
    branches: int
    right: bool | None = None
    right_in_full: bool | None = None


@dataclass(slots=True)
class Tally:
    """What one setting made of the first prompts of `total`."""

    candidate: Candidate
    total: int
    painted: list[Painted] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return len(self.painted) == self.total

    @property
    def psnr_db(self) -> float:
        """Of the mean squared error; of a tally that is not whole, the most that it can come to."""
        return pooled_db([one.psnr_db for one in self.painted], self.total)

    @property
    def branches(self) -> float:
        return float(np.mean([one.branches for one in self.painted]))

    @property
    def lost(self) -> float | None:
        """By how much fewer pictures are right, as a share of `total`; the least, of a tally that is not whole."""
        if not self.painted or self.painted[0].right is None:
            return None
        lost = sum(bool(one.right_in_full) - bool(one.right) for one in self.painted)
        return (lost - (self.total - len(self.painted))) / self.total

    def allowed(self, loss: Loss) -> bool:
        """Whether the loss is kept to; of a tally that is not whole, whether it may yet be."""
        near_enough = loss.min_psnr_db is None or self.psnr_db >= loss.min_psnr_db
        return near_enough and (loss.max_lost is None or self.lost is None or self.lost <= loss.max_lost)

    def facts(self) -> dict[str, Any]:
        """JSON-able; `psnr_db` and `lost` are bounds where `prompts` is less than `of`."""
        each = [one.psnr_db for one in self.painted]
        return {
            **self.candidate.facts(),
            "prompts": len(each),
            "of": self.total,
            "branches": self.branches,
            "psnr_db": self.psnr_db,
            "median_psnr_db": float(np.median(each)),
            "worst_psnr_db": min(each),
            "lost": self.lost,
            "right": None if self.lost is None else sum(bool(one.right) for one in self.painted),
            "right_in_full": None if self.lost is None else sum(bool(one.right_in_full) for one in self.painted),
        }


def pooled_db(psnrs_db: Sequence[float], total: int) -> float:
    """The PSNR of the mean of squared errors given as PSNRs, of `total` pictures; those not given have no error."""
    error = sum(10 ** (-psnr_db / 10) for psnr_db in psnrs_db) / total
    return math.inf if error == 0 else -10 * math.log10(error)


def walked(
    candidates: Sequence[Candidate], paint: Callable[[Candidate, int], Painted], total: int, loss: Loss
) -> list[Tally]:
    """Settings from the cheapest on, each painted prompt by prompt until it is worse than is allowed or worth its cost.

    Those whole, allowed and worth it are the front: each costs more than the one before it and is better by a decibel.
    The walk ends where one is far better than is allowed. paint: paints a prompt, by its index, of `total`.
    """
    tallies: list[Tally] = []
    worth = -math.inf if loss.min_psnr_db is None else loss.min_psnr_db
    enough = None if loss.min_psnr_db is None else worth + _ENOUGH_DB
    for candidate in sorted(candidates, key=lambda one: one.branches):
        tally = Tally(candidate, total)
        tallies.append(tally)
        for index in range(total):
            tally.painted.append(paint(candidate, index))
            if tally.psnr_db < worth or not tally.allowed(loss):
                break
        else:
            worth = tally.psnr_db + _BETTER_DB
            enough = tally.psnr_db + _ENOUGH_DB if enough is None else enough
        if enough is not None and worth >= enough:
            break
    return tallies


def nearest_of(tallies: Sequence[Tally], paint: Callable[[Candidate, int], Painted], loss: Loss) -> Tally:
    """The whole tally that comes nearest to a loss that none of a walk keeps to: by pictures lost, then by its PSNR.

    What a tally that is not whole may come to is a bound: the one that may be the nearest is painted on until one that
    is whole is as near as all others may be.
    """
    while True:
        nearest = max(tallies, key=lambda tally: (*_nearness(tally, loss), tally.whole))
        if nearest.whole:
            return nearest
        nearest.painted.append(paint(nearest.candidate, len(nearest.painted)))


def _nearness(tally: Tally, loss: Loss) -> tuple[float, float]:
    """The larger the nearer; of a tally that is not whole, the most that it can come to."""
    if loss.max_lost is None or tally.lost is None:
        return 0.0, tally.psnr_db
    return min(0.0, loss.max_lost - tally.lost), tally.psnr_db


def front_of(tallies: Sequence[Tally], loss: Loss) -> list[Tally]:
    """The tallies of a walk that are whole, allowed, and better than what cost less by what they have to bring.

    By what they cost when they ran, which may be another order than the forecast's.
    """
    front: list[Tally] = []
    allowed = (tally for tally in tallies if tally.whole and tally.allowed(loss))
    for tally in sorted(allowed, key=lambda one: (one.branches, -one.psnr_db)):
        if not front or tally.psnr_db >= front[-1].psnr_db + _BETTER_DB:
            front.append(tally)
    return front
