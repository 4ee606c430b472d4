"""Hybridiff's window as a plan has it: when it opens and closes, and what the stages do within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .arguments import did_you_mean, finite_number, whole_number
from .discrepancy import Taus
from .errors import RequestError
from .stage_work import Pipelining

_WHERE = "placement_config"
# What Hybridiff and AsyncDiff call them.
_PIPELINING = {"model_n": "stages", "stride": "stride", "time_shift": "time_shift"}
_TAUS = {"L_slope" if field.name == "l_slope" else field.name: field.name for field in fields(Taus)}


@dataclass(frozen=True, slots=True)
class Window:
    """When the window opens and closes, and how the stages run in it."""

    taus: Taus
    pipelining: Pipelining

    @classmethod
    def of(cls, config: object, default: Taus, rows: int) -> Window:
        """`default`, and what `config`, a mapping or None, says otherwise.

        rows: how many the plan has.

        Raises:
            RequestError: it is no mapping, or has an unknown key or a value of another type.
            PlanError: a value out of range, or a window that could close behind the last row.
        """
        keys = (*_TAUS, *_PIPELINING)
        if config is not None and not isinstance(config, Mapping):
            raise RequestError(_WHERE, "type", got=config, expected=f"keys and values of {', '.join(keys)}")
        taus: dict[str, Any] = asdict(default)
        pipelining: dict[str, Any] = {}
        for name, given in dict(config or {}).items():
            if name in _TAUS:
                number = finite_number(given) if name == "eps_slope" else whole_number(given)
                taus[_TAUS[name]] = _required(name, number, given)
            elif name == "time_shift":
                pipelining[name] = _required(name, given if isinstance(given, bool) else None, given)
            elif name in _PIPELINING:
                pipelining[_PIPELINING[name]] = _required(name, whole_number(given), given)
            else:
                expected, remedy = f"one of {', '.join(keys)}", did_you_mean(str(name)[:80], keys)
                raise RequestError(_WHERE, "unknown key", got=name, expected=expected, remedy=remedy)
        window = cls(Taus(**taus), Pipelining(**pipelining))
        window.taus.check_steps(rows)
        return window


def require_window_rows(denoisers: Sequence[str], guided: Sequence[bool], guidance: str) -> None:
    """Check that a window can lie in a plan's rows.

    Raises:
        RequestError: they are of several denoisers, some have no guidance, or guidance is not fixed.
    """
    names = tuple(dict.fromkeys(denoisers))
    wrong = (
        f"denoisers {' and '.join(names)}" if len(names) > 1 else "",
        "" if all(guided) else f"{len(guided) - sum(guided)} unguided of {len(guided)}",
        f"{guidance} guidance" if guidance != "fixed" else "",
    )
    if any(wrong):
        raise RequestError(
            "placement",
            f"rows that hybridiff cannot run ({', '.join(filter(None, wrong))})",
            expected="one denoiser, guided in every row, by fixed guidance",
            remedy="Ask for another placement, or for steps on one denoiser with guidance throughout.",
        )


def _required(name: str, value: Any, given: object) -> Any:
    if value is None:
        kind = {"eps_slope": "a finite number", "time_shift": "true or false"}.get(name, "a whole number")
        raise RequestError(f"{_WHERE}: {name}", "type", got=given, expected=kind)
    return value
