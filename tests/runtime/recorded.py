"""Pipelines whose models can be asked what they were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends.base import Array, Binding, Session, Shape


class RecordedBinding:
    """A binding that keeps what it was given at every run."""

    def __init__(self, binding: Binding, given: list[dict[str, Array]]) -> None:
        self.inputs, self.outputs, self._binding, self._given = binding.inputs, binding.outputs, binding, given

    def run(self) -> None:
        self._given.append({name: array.copy() for name, array in self.inputs.items()})
        self._binding.run()


class RecordedSession:
    """A session whose bindings keep what they are given, in the order of the runs."""

    def __init__(self, session: Session) -> None:
        self.inputs, self.outputs, self._session = session.inputs, session.outputs, session
        self.given: list[dict[str, Array]] = []

    def bind(self, input_shapes: Mapping[str, Shape]) -> RecordedBinding:
        return RecordedBinding(self._session.bind(input_shapes), self.given)

    def close(self) -> None:
        self._session.close()


class Recorded:
    """A pipeline, and what its models were given."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, manifest = pipeline, pipeline.bundle.manifest
        names = [name for role in ("denoiser", "controlnet", "vae_encoder") for name in manifest.names(role)]
        self.sessions = {name: RecordedSession(pipeline._models.session(name)) for name in names}
        opened = pipeline._models._sessions
        opened.update({key: self.sessions[key[0]] for key in opened if key[0] in self.sessions})

    def given(self, model: str = "", **arguments: Any) -> list[dict[str, Array]]:
        """What a model, the first denoiser by default, was given in every run of a generation."""
        session = self.sessions[model or self.pipeline.bundle.manifest.names("denoiser")[0]]
        session.given.clear()
        self.pipeline(**{"prompt": "red blue", "seed": 7, "num_inference_steps": 1, **arguments})
        return list(session.given)
