"""What building engines takes: each in a process of its own and into a cache that has nothing, then asked for again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from tandemrt.engines.build import ensure_engine
from tandemrt.engines.plan import Request
from tandemrt.runtime.errors import BenchmarkError, CacheError, EngineError
from tandemrt.runtime.variant import PLAIN

from .memory import in_fresh_process, peak_gib
from .rounds import Progress, rotated

Made = TypeVar("Made")
# Whose builds stand beside plain ones.
PEERED = "tensorrt-rtx"
_Shapes = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(slots=True)
class Builds:
    """What one engine took, round by round: seconds until it was there, MiB of the builder's memory at its peak.

    again_s: seconds of having it once it is there. size_mb: of the last one. failed: why there is none.
    """

    build_s: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    size_mb: float = 0.0
    again_s: list[float] = field(default_factory=list)
    failed: str = ""

    def fail(self, why: str) -> None:
        """It has no figures, then."""
        self.failed = why
        for one in (self.build_s, self.peak_mib, self.again_s):
            one.clear()


@dataclass(frozen=True, slots=True)
class Asked:
    """An engine that is wanted, what it took, and what a plain build of the same graph did, where there is one."""

    request: Request
    own: Builds = field(default_factory=Builds)
    plain: Builds | None = None


def asked(request: Request) -> Asked:
    """An engine that is to be built; beside a plain build where Polygraphy makes the same one of the same file."""
    made_of = request.ingredients
    peered = made_of.backend == PEERED and made_of.variant == PLAIN and made_of.precision != "bf16"
    return Asked(request, plain=Builds() if peered else None)


def build_in_turns(every: Sequence[Asked], rounds: int, cache: Path, progress: Progress) -> None:
    """Build all of them in turns, every round beginning with the next one; one that fails is left out from there.

    cache: a folder with room for an engine; what is built there does not stay.

    Raises:
        CacheError: it cannot be written or is full.
    """
    done, work = 0, rounds * len(every)
    for round_ in range(rounds):
        for one in rotated(every, round_):
            progress(f"round {round_ + 1} of {rounds}: {one.request.title}", done, work)
            done += 1
            with TemporaryDirectory(dir=cache) as scratch:
                if not one.own.failed:
                    _build(one.request, Path(scratch), one.own)
                if one.plain is not None and not one.plain.failed:
                    _build_plain(one.request, Path(scratch), one.plain)
    progress("done", work, work)


def plain_build(model: Path, shapes: _Shapes, out: Path) -> tuple[float, float]:
    """Build `model` for TensorRT-RTX through Polygraphy; seconds of parsing, building and writing, peak in GiB.

    For a process of its own, whose output it closes.

    shapes: the least, the best and the largest of every input, by its name.
    """
    for stream in (1, 2):  # what builders print is nobody's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    from polygraphy.backend.trt import (  # noqa: PLC0415
        CreateConfig,
        Profile,
        engine_bytes_from_network,
        network_from_onnx_path,
    )

    profile = Profile()
    for name, sizes in shapes.items():
        profile.add(name, *sizes)
    began = time.perf_counter()
    network = network_from_onnx_path(str(model), strongly_typed=True)
    out.write_bytes(engine_bytes_from_network(network, config=CreateConfig(profiles=[profile])))
    return time.perf_counter() - began, peak_gib()


def _build(request: Request, cache: Path, builds: Builds) -> None:
    """Build an engine into an empty cache, then ask for it again."""
    try:
        built, build_s = _timed(lambda: ensure_engine(request, cache, _silent, {}))
    except CacheError:
        raise
    except EngineError as error:
        builds.fail(str(error))
        return
    again, again_s = _timed(lambda: ensure_engine(request, cache, _silent, {}))
    if again.built:
        raise BenchmarkError(request.title, "was not found in the cache that it had just been built into")
    builds.build_s.append(build_s)
    builds.peak_mib.append(built.engine.peak_memory_bytes / 2**20)
    builds.again_s.append(again_s)
    builds.size_mb = built.engine.size_bytes / 1e6


def _build_plain(request: Request, folder: Path, builds: Builds) -> None:
    (profile,) = request.ingredients.profiles
    shapes = {name: (one.min, one.opt, one.max) for name, one in profile.items()}
    out = folder / "plain"
    try:
        build_s, peak = in_fresh_process(plain_build, request.model, shapes, out)
    except Exception as error:  # a peer fails in any way
        builds.fail(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return
    builds.build_s.append(build_s)
    builds.peak_mib.append(peak * 1024)
    builds.size_mb = out.stat().st_size / 1e6


def _timed(work: Callable[[], Made]) -> tuple[Made, float]:
    began = time.perf_counter()
    made = work()
    return made, time.perf_counter() - began


def _silent(_message: str, _done: int, _total: int) -> None:
    """Report to nobody."""
