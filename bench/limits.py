"""How near a bundle's models come to what the machine can do.

The limit is measured, not looked up: what a chain of large matrix products and what a copy of a large array reach
through the same backend, in turns with the models. A call takes no less than its floating-point operations at the one
rate, and than its bytes at the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandemrt.runtime.backends.base import Binding
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import Target

from .graph_work import ABOVE_NOTE, BYTES_NOTE, Work, call_shapes, work_of
from .rates import CHAIN, Options, Times, bound, in_turns, opened_peaks, product_name
from .reports.schema import Column, Figure, Row, Section, Unit


@dataclass(frozen=True, slots=True)
class Opened:
    """A component that is ready to run: the precision it computes in, and the work of a call."""

    precision: str
    work: Work
    binding: Binding


def opened(bundle: Bundle, name: str, target: Target, profile: str, options: Options) -> Opened:
    """Component `name` at what a profile is tuned for.

    Raises:
        TargetError, ExecutionError: it cannot run on the target.
        ArgumentError: the profile is none, or outside the model.
    """
    own, shapes = target.of_component(bundle.component(name)), call_shapes(bundle, name, profile)
    binding = bound(bundle.model_path(name), own, shapes, options)
    return Opened(str(own.precision), work_of(bundle, name, shapes, str(own.precision)), binding)


def limits_section(bundle: Bundle, target: Target, names: Sequence[str], profile: str, options: Options) -> Section:
    """The machine's rates, and of each component the work, milliseconds a call, and share of the limit by round.

    Raises:
        BundleError, TargetError, ExecutionError, ArgumentError: as `opened` and `work_of`.
    """
    models = {name: opened(bundle, name, target, profile, options) for name in names}
    peaks = opened_peaks(target, (model.precision for model in models.values()), options)
    spent = iter(in_turns((*peaks.bindings, *(model.binding for model in models.values())), options))
    flops_per_ms = {precision: peaks.flops / next(spent) for precision in peaks.products}
    bytes_per_ms = peaks.bytes / next(spent)
    rows = [
        _row(name, model, next(spent), (flops_per_ms[model.precision], bytes_per_ms)) for name, model in models.items()
    ]
    rates = [
        Row(name=product_name(options, one), figures={"gflops": _figure("GFLOP/s", rate / 1e6)})
        for one, rate in flops_per_ms.items()
    ]
    rates.append(Row(name="a copy", figures={"gbytes": _figure("GB/s", bytes_per_ms / 1e6)}))
    return Section(
        key=f"limits {target}",
        title=f"The limit on {target}",
        columns=(
            Column(of="flops", title="GFLOP"),
            Column(of="bytes", title="MB at least"),
            Column(of="call", title="ms a call"),
            Column(of="gflops", title="GFLOP/s"),
            Column(of="gbytes", title="GB/s"),
            Column(of="share", title="of the limit"),
        ),
        rows=(*rows, *rates),
        note=f"One call each, {profile}. The limit is the machine's own: what a chain of {CHAIN} matrix products and a "
        "copy of a large array reach through the same backend in the same round. A call takes no less than its "
        f"operations at the one rate, and than its bytes ({BYTES_NOTE}) at the other. {ABOVE_NOTE}",
    )


def _row(name: str, model: Opened, taken: Times, rates: tuple[Times, Times]) -> Row:
    """A component's figures. rates: operations and bytes a millisecond, by round."""
    work = model.work
    least = np.maximum(work.flops / rates[0], work.bytes / rates[1])
    figures = {
        "flops": Figure(unit="GFLOP", samples=(work.flops / 1e9,)),
        "bytes": Figure(unit="MB", samples=(work.bytes / 1e6,)),
        "call": _figure("ms", taken),
        "gflops": _figure("GFLOP/s", work.flops / taken / 1e6),
        "share": _figure("limit", least / taken),
    }
    return Row(name=f"{name}, {model.precision}", figures=figures)


def _figure(unit: Unit, samples: Times) -> Figure:
    return Figure(unit=unit, samples=tuple(samples.tolist()))
