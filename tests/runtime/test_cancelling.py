"""Cancelling: whatever model is running is the last that runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import CancelledError, Pipeline
from tandemrt.runtime.backends.onnxruntime import OnnxRuntimeBinding
from tandemrt.runtime.models import Models
from tandemrt.runtime.sampler import Sampler
from tandemrt.runtime.stream import Stream

from .tiny_families import write_tiny_editing

SIZE = 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cancelling") / "bundle"
    write_tiny_editing(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as pipeline:
        yield pipeline


def edit(pipeline: Pipeline) -> Stream:
    """Two pictures from two pictures: models of every kind run, most of them twice."""
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8))
    arguments: dict[str, Any] = {"image": pictures, "strength": 1.0, "num_inference_steps": 2, "previews": 1}
    return pipeline.stream(["red", "blue"], negative_prompt="red red", **arguments)


def test_no_model_runs_after_the_one_that_is_cancelled(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, runs = OnnxRuntimeBinding.run, 0

    def counted(self: OnnxRuntimeBinding) -> None:
        nonlocal runs
        run(self)
        runs += 1
        if runs == last:
            stream.cancel()

    monkeypatch.setattr(OnnxRuntimeBinding, "run", counted)
    last = 0
    with Pipeline.open(bundle, threads=1) as pipeline:
        stream = edit(pipeline)
        stream.result()
        every = runs
    # Three texts, two pictures in, two rows with previews of two pictures, two pictures out.
    assert every == 3 + 2 + 2 * (1 + 2) + 2
    for last in range(1, every):
        runs = 0
        # A pipeline of its own: texts are remembered.
        with Pipeline.open(bundle, threads=1) as pipeline:
            stream = edit(pipeline)
            with pytest.raises(CancelledError, match=r"cancelled after row \d of 2"):
                stream.result()
        assert runs == last


def test_no_model_is_loaded_after_the_one_that_is_cancelled(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, loaded = Models._opened, []

    def cancelling(self: Models, name: str, *made_of: Any) -> Any:
        loaded.append(name)
        if name == last:
            stream.cancel()
        return opened(self, name, *made_of)

    monkeypatch.setattr(Models, "_opened", cancelling)
    for last in ("text_encoder", "vae_encoder", "unet"):
        loaded.clear()
        with Pipeline.open(bundle, threads=1) as pipeline:
            stream = edit(pipeline)
            with pytest.raises(CancelledError, match="cancelled after row 0 of 2"):
                stream.result()
        assert loaded[-1] == last


def test_cancelling_stops_before_the_next_row_and_leaves_the_pipeline_usable(pipe: Pipeline) -> None:
    stream = pipe.stream("red", seed=7, num_inference_steps=50)
    next(stream)
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    canceller.join()
    with pytest.raises(CancelledError, match="after row 1 of 50"):
        list(stream)
    for _ in range(2):
        with pytest.raises(CancelledError, match="after row 1 of 50"):
            stream.result()
    assert len(pipe("red", num_inference_steps=1).images) == 1


def test_cancelling_before_the_first_row_runs_none(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = pipe.stream("red", seed=7, num_inference_steps=2)
    stream.cancel()
    monkeypatch.setattr(Sampler, "run", None)
    with pytest.raises(CancelledError, match="after row 0 of 2"):
        next(stream)
