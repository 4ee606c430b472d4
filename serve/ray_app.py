"""A bundle on several machines with Ray Serve: `serve run tandemrt.serve.ray_app:build bundle=/models/bundle`.

Each part of a picture is a deployment of its own, with its own resources and replicas: texts, every denoiser, decoding;
where `branches` names a denoiser, another one has the branch of guidance without the prompt. Before them stands the
same HTTP application as of `tandemrt serve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.targets import ENGINES_ONLY, Target, parse_target

from .app import application_of
from .metrics import Metrics
from .ray_calls import Branch, Handles, threads_here
from .ray_options import NONE, Options, apart_of, options_of, token_of
from .ray_replica import DECODER, TEXT, Place, Replica
from .ray_spread import Spread
from .served import Served
from .tokens import TokenFile

HTTP, UNCONDITIONAL = "http", "-unconditional"
# One runs, and one is there when that has ended; others wait where they come from.
_ONGOING = 2
# Requests beside those that paint: of health, of metrics, of the page.
_OTHERS = 64


class Part(Replica):
    """A replica that uses as many threads as it has CPUs of its machine."""

    def __init__(self, place: Place, part: str, branch: DeploymentHandle | None = None) -> None:
        super().__init__(place, part, threads_here(), None if branch is None else Branch(branch))


class Ingress:
    """The server, whose pipeline's parts are other deployments; it is ready when they have painted a picture."""

    def __init__(
        self, options: Options, token: str | None, handles: Mapping[str, DeploymentHandle], apart: tuple[str, ...]
    ) -> None:
        self._options, self._token, self._handles, self._apart = options, token, handles, apart

    def __serve_build_asgi_app__(self) -> Starlette:
        limits, metrics = self._options.limits, Metrics()
        served = Served.on(Bundle.open(self._options.bundle), parse_target(self._options.target))
        painter = Spread(served.manifest, Handles(self._handles), limits, metrics, self._apart)
        file = self._options.token_file
        token = self._token if file in (None, NONE) else TokenFile(Path(str(file)))
        return application_of(painter, served, limits, token, metrics)


def build(args: dict[str, Any]) -> Application:
    """The application of a bundle; see `Options` for what it is told.

    Raises:
        ArgumentError: an option is unknown or cannot be used, or there is no token.
        BundleError: as `Pipeline.open`.
    """
    options = options_of(args)
    token = token_of(options)
    bundle = Bundle.open(options.bundle)
    denoisers = bundle.manifest.names("denoiser")
    apart = apart_of(options, denoisers)
    parts = _Parts(options, Place(options.bundle, bundle.digest, options.target, options.cache), denoisers)
    handles = {name: parts.bound(name, name) for name in (TEXT, DECODER)}
    for name in denoisers:
        branch = parts.bound(f"{name}{UNCONDITIONAL}", name) if name in apart else None
        handles[name] = parts.bound(name, name, branch)
    limits = options.limits
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name=HTTP,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=limits.running + limits.waiting + _OTHERS,
        graceful_shutdown_timeout_s=limits.seconds,
        **_queued(options),
    )
    return ingress.bind(options, token, handles, apart)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The deployments of a bundle's parts."""

    options: Options
    place: Place
    denoisers: Sequence[str]

    def bound(self, name: str, of: str, branch: Application | None = None) -> Application:
        """A deployment for a part, `text`, `decoder` or a denoiser; branch: for guidance's other branch, if apart."""
        on_gpu = _on_gpu(parse_target(self.options.target))
        gpus = {"num_gpus": 1 if of in self.denoisers else 0.5} if on_gpu else {}
        deployment = serve.deployment(Part).options(
            name=name,
            ray_actor_options={"num_cpus": 1, **gpus},
            max_ongoing_requests=_ONGOING,
            graceful_shutdown_timeout_s=min(self.options.limits.seconds, 60),
            **_queued(self.options),
        )
        return deployment.bind(self.place, of, branch)


def _queued(options: Options) -> dict[str, Any]:
    """How many requests wait for a deployment, and what the others are told."""
    answer = BackpressureConfig(status_code=429, retry_after_s=1)
    return {"max_queued_requests": max(1, options.limits.waiting), "backpressure_config": answer}


def _on_gpu(target: Target) -> bool:
    return target.backend in ENGINES_ONLY or target.device == "cuda"
