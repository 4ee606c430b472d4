"""One decoder of a bundle by itself, on latents that were painted before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wire import Clock, Painter, serve


class Decoder(Painter):
    """The job's component of a bundle, on a target; the round's latent is the seed's of the job's, in turns."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import numpy as np  # noqa: PLC0415

        from tandemrt.runtime.backends import open_session  # noqa: PLC0415
        from tandemrt.runtime.bundle import Bundle  # noqa: PLC0415
        from tandemrt.runtime.targets import parse_target  # noqa: PLC0415

        bundle = Bundle.open(job["bundle"])
        component, space = bundle.component(job["component"]), bundle.manifest.latent
        latents = np.load(job["latents"])
        self._given = latents / space.scaling_factor + space.shift_factor
        target = parse_target(job["target"]).of_component(component)
        session = open_session(bundle.model_path(job["component"]), target, threads=job["threads"])
        self._binding = session.bind({"latent_sample": (1, *latents.shape[1:])})

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        self._binding.inputs["latent_sample"][0] = self._given[seed % len(self._given)]
        with clock.part("decode_s"):
            self._binding.run()
        (picture,) = self._binding.outputs.values()
        return (picture[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1)


if __name__ == "__main__":
    serve(Decoder)
