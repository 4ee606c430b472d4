"""One component of a bundle by itself, given what it was given in pictures that were painted before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wire import Clock, Painter, ran_told, serve


class Component(Painter):
    """The job's component on a target, on an engine where the cache has one; a seed takes its turn of the inputs."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import numpy as np  # noqa: PLC0415

        from tandemrt.bench.sizes import ran_bytes  # noqa: PLC0415
        from tandemrt.runtime.bundle import Bundle  # noqa: PLC0415
        from tandemrt.runtime.engine_session import Loader  # noqa: PLC0415
        from tandemrt.runtime.ran_on import GRAPH, Choosing  # noqa: PLC0415
        from tandemrt.runtime.targets import parse_target  # noqa: PLC0415

        self._numpy = np
        bundle, name = Bundle.open(job["bundle"]), job["component"]
        with np.load(job["inputs"]) as file:
            self._given = {each: file[each] for each in file.files}
        shapes = {each: given.shape[1:] for each, given in self._given.items()}
        target, cache = parse_target(job["target"]), Path(job["cache"])
        self._loader = Loader(bundle, name, target, job["threads"], cache=cache)
        session = self._loader.session()
        ran = session.ran_on(shapes) if isinstance(session, Choosing) else GRAPH
        self._binding, self._words = session.bind(shapes), {name: ran_told(ran)}
        self._figures = {f"{name}_mb": ran_bytes(bundle, name, (ran,), cache) / 1e6}
        self._paints = bundle.component(name).role == "vae_decoder"

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        for name, given in self._given.items():
            self._binding.inputs[name][...] = given[seed % len(given)]
        with clock.part("call_s"):
            self._binding.run()
        if not self._paints:
            for name, made in self._binding.outputs.items():
                if not self._numpy.isfinite(made).all():
                    raise ValueError(f"returned NaN or Inf in {name}")
            return [[[0.0, 0.0, 0.0]]]
        (picture,) = self._binding.outputs.values()
        return (picture[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1)

    def words(self) -> Mapping[str, str]:
        return self._words

    def figures(self) -> Mapping[str, float]:
        return self._figures


if __name__ == "__main__":
    serve(Component)
