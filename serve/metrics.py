"""Prometheus metrics of a server; no prompt, no key and no address is in them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tandemrt.runtime import Output

from .pictures import stages_of

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tandemrt_requests", "Requests by endpoint and outcome.", ("endpoint", "outcome"), registry=self.registry
        )
        self.waiting = Gauge("tandemrt_waiting", "Requests that wait for their turn.", registry=self.registry)
        self.running = Gauge("tandemrt_running", "Calls of the pipeline that run.", registry=self.registry)
        self.together = Histogram(
            "tandemrt_call_requests", "Requests that ran as one.", buckets=(1, 2, 4, 8, 16), registry=self.registry
        )
        self.seconds = Histogram(
            "tandemrt_stage_seconds", "Seconds of each stage.", ("stage",), buckets=_SECONDS, registry=self.registry
        )
        self.steps = Counter("tandemrt_rows", "Rows by denoiser.", ("denoiser",), registry=self.registry)
        self.fallbacks = Counter(
            "tandemrt_fallbacks", "Models that ran on something else than they could have.", ("component",),
            registry=self.registry,
        )  # fmt: skip
        self.lost = Counter(
            "tandemrt_lost",
            "Replicas that were lost while they were asked, by part.",
            ("part",),
            registry=self.registry,
        )

    def waited(self, seconds: float) -> None:
        """Count how long a request has waited."""
        self.seconds.labels("waiting").observe(seconds)

    def painted(self, output: Output, requests: int) -> None:
        """Count what a call for so many requests took."""
        self.together.observe(requests)
        for stage, milliseconds in stages_of(output).items():
            self.seconds.labels(stage).observe(milliseconds / 1e3)
        for row in output.timings.rows:
            self.steps.labels(row.denoiser).inc()
        for component, ran in output.timings.ran_on.items():
            self.fallbacks.labels(component).inc(sum(bool(one.refused) for one in ran))
        self.fallbacks.labels("cloud").inc(bool(output.degraded))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
