"""Bundles that several files' tests only read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tandemrt.runtime import Pipeline

from .tiny_families import write_tiny_control


@pytest.fixture(scope="session")
def control_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few kilobytes with ControlNets; not to be written to."""
    folder = tmp_path_factory.mktemp("control") / "bundle"
    write_tiny_control(folder)
    return folder


@pytest.fixture
def control_pipe(control_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(control_bundle, threads=1) as pipeline:
        yield pipeline
