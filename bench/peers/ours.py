"""TandemRT on a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wire import Clock, Painter, imported, serve, threads_told


class Ours(Painter):
    """The job's bundle, target, threads, cache and arguments of the request."""

    packages = ("tandemrt", "numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")

    def __init__(self, job: Mapping[str, Any]) -> None:
        from tandemrt.runtime import Pipeline  # noqa: PLC0415

        imported()
        self._pipe = Pipeline.open(job["bundle"], job["target"], threads=job["threads"], cache=job["cache"])
        self._job, self._words = job, {}

    def setting(self) -> Mapping[str, str]:
        return {"threads": threads_told(self._job["threads"], "the backend")}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        given = {**self._job["arguments"], **arguments}
        # No text comes twice, so that none is remembered.
        made = self._pipe(f"{self._job['prompt']} {seed}", seed=seed, output_type="np", **given)
        timings = made.timings
        clock.figures |= {"text_s": timings.text_ms / 1e3, "decode_s": timings.decode_ms / 1e3}
        for row in timings.rows:
            name = f"{row.denoiser}_s"
            clock.figures[name] = clock.figures.get(name, 0.0) + row.model_ms / 1e3
        clock.figures["host_s"] = sum(row.total_ms - row.model_ms for row in timings.rows) / 1e3
        self._words = {name: "; ".join(map(_told, ran)) for name, ran in timings.ran_on.items()}
        rows = timings.rows
        self._words["guided"] = f"{sum(row.guidance.guided for row in rows)} of {len(rows)}"
        if made.plan.taus is not None:
            first, end = made.plan.taus
            self._words["window"] = f"rows {first} to {end}"
        return made.images[0]

    def words(self) -> Mapping[str, str]:
        return self._words


def _told(ran: Any) -> str:
    return ", ".join((str(ran), *ran.refused, *((ran.unasked,) if ran.unasked else ())))


if __name__ == "__main__":
    serve(Ours)
