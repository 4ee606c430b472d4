"""The part of `tandemrt inspect` that shows the engines a cache holds of a bundle's components."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..bundle import Bundle
from ..engine_files import (
    REFIT,
    Engine,
    Layer,
    cached_engines,
    check_engine_files,
    origin_of,
    read_layers,
    weights_of,
)
from ..errors import EngineError
from ..variant import Variant
from .columns import aligned

SHOWN_KINDS = 8
SHOWN_BLOCKS = 8


def engine_facts(bundle: Bundle, cache: Path) -> list[dict[str, Any]]:
    """What the sidecars say of the engines that were built from a bundle's components, and what follows from it.

    They are in the order of the bundle's components, then of targets, variants and profiles. Every file's digest is
    checked: `damage` says what is wrong, None of a whole engine. One whose sidecar cannot be read comes last, with its
    `error` and nothing else.

    Raises:
        EngineError: the cache belongs to another user, or others may write to it.
    """
    names = {(origin_of(bundle, name), tuple(weights_of(bundle, name).items())): name
             for name in bundle.manifest.components}  # fmt: skip
    order = list(names.values())
    facts, unreadable = [], []
    for folder, engine in cached_engines(cache):
        if isinstance(engine, EngineError):
            unreadable.append({"folder": str(folder), "error": str(engine)})
            continue
        component = names.get((engine.ingredients.origin, tuple(sorted(engine.ingredients.weights.items()))))
        if component is not None:
            told: dict[str, Any] = msgspec.to_builtins(engine)
            facts.append({**told, "component": component, "folder": str(folder), **_derived(folder, engine)})
    facts.sort(key=lambda one: (order.index(one["component"]), *_row(one)[1:5]))
    return facts + unreadable


def engine_lines(engines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The engines as lines of text: a table, then for each its profiles and what it is made of."""
    if not engines:
        yield "no engines in the cache; `tandemrt build-engine` makes them"
        return
    known = [engine for engine in engines if "error" not in engine]
    if known:
        yield from aligned([("component", "target", "variant", "profile", "backend", "size", "build", "peak memory",
                             "engine", "files"), *map(_row, known)])  # fmt: skip
    for engine in known:
        yield ""
        yield f"{engine['folder']}"
        yield from aligned(list(_details(engine)), indent="  ")
    for engine in engines:
        if "error" in engine:
            yield f"{engine['folder']}: unusable ({engine['error']})"


def _derived(folder: Path, engine: Engine) -> dict[str, Any]:
    layers, untold = tuple[Layer, ...](), None
    try:
        layers = read_layers(folder)
    except EngineError as error:
        untold = error.without_remedy
    fused = [layer for layer in layers if len(layer.nodes) > 1]
    return {
        "damage": _damage(folder, engine),
        "size_bytes": engine.size_bytes,
        "layers": msgspec.to_builtins(layers),
        "layers_error": untold,
        "layer_kinds": dict(Counter(layer.kind for layer in layers).most_common()),
        "layer_precisions": dict(Counter(layer.precision for layer in layers if layer.precision).most_common()),
        "fused_layers": len(fused),
        "fused_nodes": sum(len(layer.nodes) for layer in fused),
    }


def _damage(folder: Path, engine: Engine) -> str | None:
    try:
        check_engine_files(folder, engine)
    except EngineError as error:
        return error.without_remedy
    return None


def _row(engine: Mapping[str, Any]) -> tuple[str, ...]:
    made_of = engine["ingredients"]
    return (
        engine["component"],
        f"{made_of['backend']}:{made_of['device']}:{made_of['precision']}",
        f"{msgspec.convert(made_of['variant'], Variant)}{', refittable' * (REFIT in made_of['flags'])}",
        " ".join(engine["profile_names"]) or "every shape",
        f"{made_of['backend']} {made_of['backend_version']}",
        f"{engine['size_bytes'] / 1e6:.1f} MB",
        f"{engine['build_s']:.1f} s",
        f"{engine['peak_memory_bytes'] / 1e6:.0f} MB",
        Path(engine["folder"]).name[:12],
        "whole" if engine["damage"] is None else "damaged",
    )


def _details(engine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if engine["damage"] is not None:
        yield "damaged", f"{engine['damage']}; `tandemrt build-engine` builds it again"
    memory: Sequence[int] = engine["profile_memory_bytes"]
    for index, (name, ranges) in enumerate(
        zip(engine["profile_names"], engine["ingredients"]["profiles"], strict=False)
    ):
        scratch = f"; {memory[index] / 1e6:.1f} MB of scratch memory" if index < len(memory) else ""
        yield f"profile {name}", "; ".join(f"{tensor} {_sides(one)}" for tensor, one in ranges.items()) + scratch
    if not engine["ingredients"]["profiles"]:
        yield "profiles", "takes every shape"
    kinds = list(engine["layer_kinds"].items())
    more = f" and {len(kinds) - SHOWN_KINDS} other kinds" if len(kinds) > SHOWN_KINDS else ""
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds[:SHOWN_KINDS])
    told = f"{len(engine['layers'])}: {listed}{more}" if kinds else "the backend did not tell"
    yield "layers", engine["layers_error"] or told
    if engine["layer_precisions"]:
        yield "precisions", ", ".join(f"{count} {name}" for name, count in engine["layer_precisions"].items())
    if engine["fused_layers"]:
        yield "fusions", f"{engine['fused_nodes']} nodes in {engine['fused_layers']} layers"
    if engine["multiply_adds"]:
        yield "work", _work(engine["multiply_adds"])
    elif engine["multiply_adds_error"]:
        yield "work", f"not counted: {engine['multiply_adds_error']}"
    yield "built with", ", ".join(f"{name} {version}" for name, version in engine["versions"].items())


def _work(by_block: Mapping[str, int]) -> str:
    """The multiply-adds of a call, and the share of the blocks with most of them."""
    total = sum(by_block.values())
    most = sorted(by_block.items(), key=lambda one: one[1], reverse=True)[:SHOWN_BLOCKS]
    rest = total - sum(work for _, work in most)
    shares = [f"{block} {work / total:.1%}" for block, work in most]
    others = [f"{len(by_block) - len(most)} others {rest / total:.1%}"] if rest else []
    return f"{total / 1e9:.3g} G multiply-adds a call: {', '.join([*shares, *others])}"


def _sides(one: Mapping[str, Sequence[int]]) -> str:
    sides = (str(low) if low == high else f"{low}..{high}" for low, high in zip(one["min"], one["max"], strict=True))
    tuned = "" if one["opt"] == one["max"] else f" tuned for ({', '.join(map(str, one['opt']))})"
    return f"({', '.join(sides)}){tuned}"
