"""TandemRT on a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wire import Clock, Painter, imported, ran_told, serve, threads_told


class Ours(Painter):
    """The job's bundle, target, threads, cache and arguments of the request."""

    packages = ("tandemrt", "numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")

    def __init__(self, job: Mapping[str, Any]) -> None:
        from tandemrt.runtime import Pipeline  # noqa: PLC0415

        imported()
        self._pipe = Pipeline.open(job["bundle"], job["target"], threads=job["threads"], cache=job["cache"])
        self._job = job
        self._timings: Any = None
        self._taus: tuple[int, int] | None = None

    def setting(self) -> Mapping[str, str]:
        target, components = self._pipe.target, self._pipe.bundle.manifest.components.values()
        computed = dict.fromkeys(str(target.of_component(one).precision) for one in components)
        threads = threads_told(self._job["threads"], "the backend")
        return {"threads": threads, "device": target.device, "precision": ", ".join(computed)}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        given = {**self._job["arguments"], **arguments}
        # No prompt comes twice, so that none is remembered; guidance's empty one is.
        made = self._pipe(f"{self._job['prompt']} {seed}", seed=seed, output_type="np", **given)
        timings = made.timings
        clock.figures |= {"text_s": timings.text_ms / 1e3, "decode_s": timings.decode_ms / 1e3}
        for row in timings.rows:
            name = f"{row.denoiser}_s"
            clock.figures[name] = clock.figures.get(name, 0.0) + row.model_ms / 1e3
        clock.figures["host_s"] = sum(row.total_ms - row.model_ms for row in timings.rows) / 1e3
        self._timings, self._taus = timings, made.plan.taus
        return made.images[0]

    def words(self) -> Mapping[str, str]:
        rows, words = self._timings.rows, {}
        for name, ran in self._timings.ran_on.items():
            words[name] = "; ".join(map(ran_told, ran))
        words["guided"] = f"{sum(row.guidance.guided for row in rows)} of {len(rows)}"
        if self._taus is not None:
            words["window"] = f"rows {self._taus[0]} to {self._taus[1]}"
        return words

    def figures(self) -> Mapping[str, float]:
        """By component the MB of files it ran on; by denoiser its rows, and those with both branches of guidance."""
        from tandemrt.bench.sizes import ran_bytes  # noqa: PLC0415

        bundle, cache, ran_on = self._pipe.bundle, self._job["cache"], self._timings.ran_on
        figures = {f"{name}_mb": ran_bytes(bundle, name, ran, cache) / 1e6 for name, ran in ran_on.items()}
        for row in self._timings.rows:
            for counted, count in (("rows", 1), ("guided", row.guidance.guided)):
                name = f"{row.denoiser}_{counted}"
                figures[name] = figures.get(name, 0) + count
        return figures


if __name__ == "__main__":
    serve(Ours)
