"""What `tandemrt build-engine` tells of engines: as facts in JSON's types, and as lines made of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.errors import CacheFullError, TandemError
from ..runtime.targets import Target
from ..runtime.variant import PLAIN
from .build import Outcome, changes, described, nearest
from .estimate import estimated, largest_calls
from .plan import Request


def target_facts(target: Target) -> dict[str, str]:
    """A target, with the reason where `auto` chose it."""
    return {"target": str(target), **({"reason": target.reason} if target.reason else {})}


def request_facts(request: Request, cache: Path) -> dict[str, Any]:
    """An engine that is wanted: whether it is there, what has changed or else is near, what building it takes."""
    changed, needs = changes(request, cache), estimated(request)
    cached = changed == ()
    return {
        **_named(request),
        "shapes": list(map(described, request.ingredients.profiles)),
        # Of what is there, the sidecar tells what was measured.
        "calls": [] if cached else list(map(asdict, largest_calls(request))),
        "cached": cached,
        "changes": None if changed is None else list(changed),
        "nearest": nearest(request, cache) if changed is None else None,
        "estimated_memory_bytes": needs.memory_bytes,
        "estimated_build_s": needs.build_s,
        "estimated_size_bytes": needs.size_bytes,
    }


def outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """An engine that is there now."""
    engine = outcome.engine
    return {
        **_named(outcome.request),
        "folder": str(outcome.folder),
        "built": outcome.built,
        "build_s": engine.build_s,
        "size_bytes": engine.size_bytes,
        "peak_memory_bytes": engine.peak_memory_bytes,
        "profile_memory_bytes": list(engine.profile_memory_bytes),
        "layers": engine.layer_count,
    }


def failure_facts(request: Request, error: Exception) -> dict[str, Any]:
    """An engine that could not be built."""
    kind, message = type(error).__name__, str(error)
    if not isinstance(error, TandemError):
        message = f"failed unexpectedly ({kind}: {message}). Build it alone with --traceback to see where."
    return {**_named(request), "error": {"type": kind, "message": message}}


def engine_line(facts: Mapping[str, Any]) -> str:
    """What became of an engine: built, there already, or not built and why."""
    if "error" in facts:
        return f"{_title(facts)}: not built: {facts['error']['message']}"
    how = f"built in {facts['build_s']:.1f} s" if facts["built"] else "was in the cache"
    return f"{_title(facts)}: {how}, {facts['size_bytes'] / 1e6:.1f} MB, {facts['folder']}"


def request_line(facts: Mapping[str, Any]) -> str:
    """Whether an engine is to be built, what that will take, and why."""
    if facts["cached"]:
        return f"{_title(facts)}: in the cache"
    why = "; ".join(["", *(facts["changes"] or [])])
    return f"{_title(facts)}: to be built, about {_needs(facts)}{why}"


def plan_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What `--print-plan` shows of `plan_facts` to a person: every engine with its shapes, then all together."""
    for target in facts["targets"]:
        if "reason" in target:
            yield f"target {target['target']}: {target['reason']}"
    for engine in facts["engines"]:
        yield request_line(engine)
        yield from _profile_lines(engine)
    engines = [engine for engine in facts["engines"] if not engine["cached"]]
    there = len(facts["engines"]) - len(engines)
    together = {
        "estimated_memory_bytes": max((one["estimated_memory_bytes"] for one in engines), default=0),
        "estimated_build_s": sum(one["estimated_build_s"] for one in engines),
        "estimated_size_bytes": sum(one["estimated_size_bytes"] for one in engines),
    }
    after_another = " one after the other" if len(engines) > 1 else ""
    what = f"{_counted(len(engines))} to be built{after_another}, about {_needs(together)}"
    yield f"{what if engines else 'nothing to be built'}; {there} in the cache ({facts['cache']})"


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """Every engine in a line where nothing was to be built; else, of several, what became of them together."""
    engines = result["engines"]
    if any("cached" in engine for engine in engines):
        yield from map(_explained, engines)
        return
    if len(engines) < 2:
        return
    built = [engine for engine in engines if engine.get("built")]
    kinds = [engine["error"]["type"] for engine in engines if "error" in engine]
    unroomed = kinds.count(CacheFullError.__name__)
    failed = f"{len(kinds)} failed" + (f" ({unroomed} for want of space)" if unroomed else "")
    told = [f"{_counted(len(built))} built in {sum(engine['build_s'] for engine in built):.1f} s"]
    told += [f"{len(engines) - len(built) - len(kinds)} in the cache before", *([failed] if kinds else [])]
    yield f"{', '.join(told)} ({result['cache']})"


def _named(request: Request) -> dict[str, Any]:
    return {
        "component": request.component,
        "variant": str(request.ingredients.variant),
        "target": str(request.target),
        "precision": request.ingredients.precision,
        "profiles": list(request.profile_names),
        "key": request.key,
    }


def _title(facts: Mapping[str, Any]) -> str:
    made = [f"({facts['variant']})"] if facts["variant"] != str(PLAIN) else []
    profiles = f", {'; '.join(facts['profiles'])}" if facts["profiles"] else ""
    asked = facts["target"].split(":")[2:]
    plain = [f"in {facts['precision']}, as it is"] if asked not in ([], [facts["precision"]]) else []
    return " ".join([facts["component"], *made, "for", facts["target"], *plain]) + profiles


def _needs(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['estimated_memory_bytes'] / 1e9:.1f} GB of memory, {facts['estimated_build_s']:.0f} s, "
        f"{facts['estimated_size_bytes'] / 1e6:.0f} MB on disk"
    )


def _profile_lines(engine: Mapping[str, Any]) -> Iterator[str]:
    """The shapes of each profile, and what its largest call takes."""
    shapes = dict(zip(engine["profiles"], engine["shapes"], strict=True))
    calls = {call["profile"]: call for call in engine["calls"]}
    for profile in {**shapes, **calls}:
        told = [shapes[profile]] if profile in shapes else []
        if profile in calls:
            call = calls[profile]
            told.append(
                f"{'its largest' if profile in shapes else 'a'} call takes about "
                f"{_memory(call['estimated_memory_bytes'])} beside the weights, "
                f"{call['multiply_adds'] / 1e9:,.1f} G multiply-adds"
                f"{'; more memory than this machine has' if call['exceeds_memory'] else ''}"
            )
        yield f"  {profile}: {'; '.join(told)}"


def _memory(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _explained(facts: Mapping[str, Any]) -> str:
    if facts["cached"]:
        return f"{_title(facts)}: in the cache"
    if facts["nearest"] is not None:
        return f"{_title(facts)}: to be built: the nearest engine there is {facts['nearest']}"
    if facts["changes"] is None:
        return f"{_title(facts)}: to be built: the cache has no engine of it for this backend"
    return f"{_title(facts)}: to be built: {'; '.join(facts['changes'])}"


def _counted(count: int) -> str:
    return "1 engine" if count == 1 else f"{count} engines"
