"""Fixtures that several folders' tests share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# The fixtures that a run's workers make together, each once.
SHARED = frozenset({"shapes_bundle", "half_bundle", "steered", "exported"})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep",
        action="store_true",
        help="the tests marked deep too, and families with all the blocks their authors publish",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Hypothesis try the same examples in every run, and new ones with --deep. No example has a deadline."""
    settings.register_profile("tandemrt", derandomize=not config.getoption("--deep"), deadline=None)
    settings.load_profile("tandemrt")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the deep tests out unless they are asked for, and put files with slow tests first.

    Otherwise a worker could come to one of these when the others have nothing left to do. Of the files that need the
    same export one that needs no other comes early, the others last: workers wait while one of them makes it.
    """
    if not config.getoption("--deep"):
        deep = [item for item in items if item.get_closest_marker("deep")]
        config.hook.pytest_deselected(items=deep)
        items[:] = [item for item in items if item not in deep]
    slow = dict.fromkeys(item.path for item in items if item.get_closest_marker("slow"))
    needed: dict[Path, set[str]] = {}
    for item in items:
        needed.setdefault(item.path, set()).update(SHARED & set(getattr(item, "fixturenames", ())))
    firsts = {next((path for path in slow if needed[path] == {name}), None) for name in SHARED}
    others = {path for path, names in needed.items() if names} - firsts
    ranks = {path: 0 if path in firsts else 2 if path in others else 1 for path in slow}
    items.sort(key=lambda item: ranks.get(item.path, 3))


@pytest.fixture(scope="session")
def shapes_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes family as an fp32 bundle, exported once per run, whichever worker asks first. Not to be written to."""
    from tandemrt.bench.shapes.bundle import ensure_bundle  # noqa: PLC0415 — most tests need none of its imports

    with shared_folder(tmp_path_factory, "shapes_bundle") as folder:
        return ensure_bundle(folder)


@pytest.fixture(scope="session")
def shapes_int8(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shapes family in int8 (`bundle`) and what it was calibrated with (`trajectories`).

    Of a picture's three models, made once per run. Not to be written to.
    """
    from tandemrt.bench.precisions import STEPS, collected, quantized  # noqa: PLC0415 (as above)

    with shared_folder(tmp_path_factory, "shapes_int8") as folder:
        if not (folder / "bundle").exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            quantized(shapes_bundle, collected(shapes_bundle, folder, STEPS), folder / "bundle", "int8")
        return folder


@contextmanager
def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that a run's workers share, made or not; one of them has it at a time."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist every worker has a folder of its own inside the run's.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared / name
