"""Checkpoints and graphs that the export's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tandemrt.export import single_file
from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.presets import Model

from ..conftest import shared_folder
from .mini import tiny_vae, write_checkpoint
from .original import State, random_states, small_models
from .single_files import PRESETS
from .steered import write_steered


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint; not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder's folder; not to be written to."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def half_bundle(checkpoint: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with a tiny decoder, as an fp16 bundle; not to be written to."""
    with shared_folder(tmp_path_factory, "half") as folder:
        if not folder.exists():
            export_bundle(ExportPlan(checkpoint, folder, (Added("vae_decoder_tiny", tiny),), dtype="fp16"))
    return folder


@pytest.fixture(scope="session")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with ControlNets, and their bundle; see `write_steered`. Not to be written to."""
    with shared_folder(tmp_path_factory, "steered") as folder:
        if not folder.exists():
            # Renamed when it is whole, so that a worker that fails leaves nothing behind.
            made = tmp_path_factory.mktemp("steered")
            write_steered(made)
            made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def states() -> Callable[[str], dict[str, State]]:
    """The random tensors of a preset's small models, by its name; not to be changed."""
    kept: dict[str, dict[str, State]] = {}
    return lambda preset: kept.setdefault(preset, random_states(preset))


@pytest.fixture(scope="session")
def true_depth(pytestconfig: pytest.Config) -> bool:
    """Whether families are to have all their blocks; see `family.at_depth`."""
    return bool(pytestconfig.getoption("--deep"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    """Single files are read as if every preset's architectures were the small ones that the tests write."""
    every = {name: model for preset in (*PRESETS, "sd21-base") for name, model in small_models(preset).items()}
    monkeypatch.setattr(single_file, "models", lambda: every)
    return every
