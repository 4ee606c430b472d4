"""A folder that a long run fills file by file: what the run is, so that it can go on when it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import ArgumentError
from ..runtime.files import sweep_parts, write_whole

RUN_FILE = "run.json"


def begin_run(
    folder: Path,
    facts: Mapping[str, Any],
    files_of: Callable[[Mapping[str, Any]], Iterable[str]],
    *,
    discard: bool = False,
) -> None:
    """Make a folder that is there ready for the run that `facts` describe: its own that was interrupted, or a new one.

    facts: all that decides what the files hold, as JSON can hold it; kept as `run.json`.
    files_of: the names of the files of a run of such facts.
    discard: whether to begin anew in any case; the files of the run that is there are then removed, and no others.

    Raises:
        ArgumentError: another run is in the folder and `discard` is off; or, in any case, other files and no such run.
        OSError: the folder cannot be written.
    """
    raw = json.dumps(facts, indent=2).encode()
    wanted = json.loads(raw)
    sweep_parts(folder)
    former = _read(folder)
    if former is None:
        _require_empty(folder)
    elif former.keys() != wanted.keys() or former["format"] != wanted["format"]:
        what = f"holds a {RUN_FILE} that is of no such run"
        raise ArgumentError(str(folder), what, expected="a new folder", remedy="Give another --out.")
    elif discard:
        _remove(folder, files_of(former))
    elif former != wanted:
        raise _another_run(folder, former, wanted)
    else:
        return
    write_whole(folder / RUN_FILE, lambda stream: stream.write(raw))


def _read(folder: Path) -> Mapping[str, Any] | None:
    """The run that is in a folder; an empty one where its file is damaged."""
    try:
        found = json.loads((folder / RUN_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _require_empty(folder: Path) -> None:
    other = next((path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")), None)
    if other is not None:
        raise ArgumentError(str(folder), f"holds other files and no {RUN_FILE}", got=other, expected="a new folder")


def _another_run(folder: Path, former: Mapping[str, Any], wanted: Mapping[str, Any]) -> ArgumentError:
    names = [name for name in {**wanted, **former} if former.get(name) != wanted.get(name)]
    differing = "; ".join(_shown(name, former.get(name), wanted.get(name)) for name in names)
    remedy = "Give the same arguments to go on, another --out, or --discard to start over."
    return ArgumentError(str(folder), f"holds a run of other settings: {differing}", remedy=remedy)


def _shown(name: str, then: object, now: object) -> str:
    """What differs; of a mapping its keys that do."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**now, **then} if then.get(key) != now.get(key)]
        return ", ".join(_shown(key, then.get(key), now.get(key)) for key in keys)
    return f"{name} is {then!r} there, {now!r} here"


def _remove(folder: Path, names: Iterable[str]) -> None:
    """The former run's files, and last what says that there was one."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    (folder / RUN_FILE).unlink()
