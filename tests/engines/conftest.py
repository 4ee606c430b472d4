"""Bundles and requests that the builders' tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tandemrt.engines.plan import BuildPlan, Request, requests_of
from tandemrt.engines.profiles import parse_profile
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.variant import UPDATE

from ..conftest import shared_folder
from ..runtime.tiny_bundle import write_tiny_bundle

Requests = Callable[..., tuple[Request, ...]]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few kilobytes; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Bundle:
    return Bundle.open(tiny_path)


@pytest.fixture(scope="session")
def requests(tiny: Bundle) -> Requests:
    """The requests for targets, components and profiles as on the command line, but for update engines."""

    def requests(
        *targets: str, components: tuple[str, ...] = (), profiles: tuple[str, ...] = (), bundle: Bundle = tiny
    ) -> tuple[Request, ...]:
        plan = BuildPlan(
            bundle.path,
            tuple(map(parse_target, targets)),
            Path("unused"),
            components,
            tuple(map(parse_profile, profiles)),
        )
        return tuple(one for one in requests_of(plan, bundle) if one.ingredients.variant != UPDATE)

    return requests


@pytest.fixture
def to_triton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """Export a bundle for Triton; the repository."""

    def to_triton(bundle: Path, *options: str) -> Path:
        out = tmp_path / "models"
        assert main(["export-triton", str(bundle), str(out), *options]) == 0, capsys.readouterr().err
        return out

    return to_triton


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The graphs of small denoisers by family, exported once per run; see `small_denoisers`. Not to be written to."""

    def exported(family: str) -> Path:
        from .small_denoisers import export, module  # noqa: PLC0415 (torch, which other tests here need not)

        with shared_folder(tmp_path_factory, f"small-{family}") as folder:
            if not folder.exists():
                # Renamed when it is whole, so that a worker that fails leaves nothing behind.
                export(module(family), tmp_path_factory.mktemp(family)).parent.rename(folder)
        return folder / "model.onnx"

    return exported
