"""What differs between two reports besides figures: the machine, what ran, what was asked for, what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .precision import precisions_of
from .schema import Report, Row

_MEASURED = "measured"
# Of a request: what changes what a figure is of. The bundle is known by its files.
_WORK = ("steps", "size", "guidance scale", "placement", "decoder", "pictures a call", "profile")
# By what share files of the same models may differ: exported anew, their graphs are of other bytes.
_SAME_FILES = 0.05


def machine_changes(before: Report, after: Report) -> Iterator[str]:
    """What of the machine, the method and the subjects differs, a line each: figures of other machines say little."""
    pairs = {
        "machine": (before.machine.processor, after.machine.processor),
        "cores": (before.machine.cores, after.machine.cores),
        "devices": tuple(", ".join(one["name"] for one in each.machine.devices) for each in (before, after)),
        "system": (before.machine.system, after.machine.system),
        "Python": (before.machine.python, after.machine.python),
        "threads": (before.method.threads, after.method.threads),
        "bundles": tuple(
            ", ".join(f"{one.name} {one.digest[:12]}" for one in each.subjects) for each in (before, after)
        ),
    }
    versions = {
        name: (before.machine.versions.get(name, "none"), after.machine.versions.get(name, "none"))
        for name in {**before.machine.versions, **after.machine.versions}
    }
    asked = {name: (before.request.get(name), after.request.get(name)) for name in {**before.request, **after.request}}
    for name, (one, other) in {**pairs, **versions, **asked}.items():
        if one != other:
            yield f"{name}: {one} → {other}"


def ran_changes(before: Report, after: Report) -> Iterator[str]:
    """What of "What ran" and of the models differs, a line each: versions that the machine's tell are left out."""
    precisions = precisions_of(before), precisions_of(after)
    machine = before.machine.versions, after.machine.versions
    for name, (one, other) in _rows(before, after, "contenders"):
        versions = _versions(one), _versions(other)
        for package in dict.fromkeys((*versions[0], *versions[1])):
            pair = versions[0].get(package, "none"), versions[1].get(package, "none")
            if pair != tuple(each.get(package, "none") for each in machine):
                yield from _line(f"{name}: {package}", *pair)
        yield from _line(f"{name}: computes in", precisions[0].get(name), precisions[1].get(name))
        for word in ("threads", "device", "models"):
            yield from _line(f"{name}: {word}", one.words.get(word), other.words.get(word))
        pair = one.words.get("otherwise") or "nothing", other.words.get("otherwise") or "nothing"
        yield from _line(f"{name}: otherwise than asked", *pair)
    for name, (one, other) in _rows(before, after, "models"):
        for word, value in one.words.items():
            yield from _line(f"{name}: {'on ' if word != 'precision' else ''}{word}", value, other.words.get(word))


def apart(before: Report, after: Report) -> tuple[str, ...]:
    """Why figures of the two are of different things, such as another size or bundle; empty where they are not.

    Bundles with models of the same names and sizes count as the same: times do not depend on what the weights are.
    """
    found = [line for name in _WORK for line in _line(name, before.request.get(name), after.request.get(name))]
    for one, other in zip(before.subjects, after.subjects, strict=False):
        if one.digest != other.digest and not _alike(one.file_mb, other.file_mb):
            found.append(f"bundle: {one.name} → {other.name}, of other models")
    return tuple(found)


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(
        abs(size - other[name]) <= _SAME_FILES * max(size, other[name]) for name, size in one.items()
    )


def _rows(before: Report, after: Report, key: str) -> Iterator[tuple[str, tuple[Row, Row]]]:
    """Rows of a section that both have, and that did not fail."""
    ends = before.section(key), after.section(key)
    for row in ends[0].rows if ends[0] is not None else ():
        other = None if ends[1] is None else ends[1].row(row.name)
        if other is not None and not row.failed and not other.failed:
            yield row.name, (row, other)


def _versions(row: Row) -> dict[str, str]:
    """Versions by package of what a contender told of itself."""
    told = (one.rpartition(" ") for one in row.words.get("runs", "").split(", "))
    return {name: version for name, _, version in told if name}


def _line(what: str, one: str | None, other: str | None) -> Iterator[str]:
    """What changed, where both tell it."""
    if one is not None and other is not None and one != other:
        yield f"{what}: {one} → {other}"


def unmatched(before: Report, after: Report) -> Iterator[str]:
    """What one of the two has measured and the other has not, a line for all rows of a section that changed alike."""
    keys = dict.fromkeys(section.key for report in (before, after) for section in report.sections)
    for key in keys:
        found = [report.section(key) for report in (before, after)]
        title = next(one.title for one in found if one is not None)
        alike: dict[str, list[str]] = {}
        for name in dict.fromkeys(row.name for one in found if one is not None for row in one.rows):
            first, second = (_state(None if one is None else one.row(name)) for one in found)
            if first != second and _MEASURED in (first, second):
                alike.setdefault(f"{first} → {second}", []).append(name)
        yield from (f"{title}, {', '.join(names)}: {change}" for change, names in alike.items())


def _state(row: Row | None) -> str:
    if row is not None and row.failed:
        return f"not measured, {row.failed}"
    return _MEASURED if row is not None and row.figures else "not there"
