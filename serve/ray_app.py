"""A bundle on several machines with Ray Serve: `serve run tandemrt.serve.ray_app:build bundle=/models/bundle`.

Each part of a picture is a deployment of its own, with its own resources and replicas: texts, every denoiser, decoding;
where `branches` names a denoiser, another one has the branch of guidance without the prompt. Before them stands the
same HTTP application as of `tandemrt serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli.cloud_options import token_in_environment
from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.targets import ENGINES_ONLY, Target, parse_target

from .app import application_of
from .command import TOKEN
from .limits import Limits
from .metrics import Metrics
from .ray_calls import Branch, Handles, threads_here
from .ray_replica import DECODER, TEXT, Place, Replica
from .ray_spread import Spread
from .served import Served
from .tokens import TokenFile

HTTP, UNCONDITIONAL, NONE = "http", "-unconditional", "none"
# One runs, and one is there when that has ended; others wait where they come from.
_ONGOING = 2
# Requests beside those that paint: of health, of metrics, of the page.
_OTHERS = 64
_RUNNING = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What `build` is told, in a Serve config's `args` or on the command line.

    bundle: its folder, at the same path on every machine. target, cache: as of `tandemrt serve`.
    token_file: the file of what requests have to bring, where `http` runs; `none` lets everybody ask who reaches it.
        $TANDEMRT_TOKEN otherwise, where the application is built.
    branches: the denoisers, with commas between, whose branches of guidance run on two replicas at once.
    limits: of the server; `running` is how many requests are under way in all parts together.
    """

    bundle: str
    target: str = "auto"
    cache: str | None = None
    token_file: str | None = None
    branches: str = ""
    limits: Limits = field(default_factory=lambda: Limits(running=_RUNNING))


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
    token = _token(options)
    bundle = Bundle.open(options.bundle)
    denoisers = bundle.manifest.names("denoiser")
    apart = tuple(name.strip() for name in options.branches.split(",") if name.strip())
    for name in apart:
        if name not in denoisers:
            raise ArgumentError("branches", "unknown denoiser", got=name, expected=f"of {', '.join(denoisers)}")
    place = Place(options.bundle, bundle.digest, options.target, options.cache)
    target = parse_target(options.target)

    def part(name: str, of: str, branch: Application | None = None) -> Application:
        gpus = {} if not _on_gpu(target) else {"num_gpus": 1 if of in denoisers else 0.5}
        deployment = serve.deployment(Part).options(
            name=name,
            ray_actor_options={"num_cpus": 1, **gpus},
            max_ongoing_requests=_ONGOING,
            max_queued_requests=max(1, options.limits.waiting),
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
            graceful_shutdown_timeout_s=min(options.limits.seconds, 60),
        )
        return deployment.bind(place, of, branch)

    handles = {name: part(name, name) for name in (TEXT, DECODER)}
    for name in denoisers:
        branch = part(f"{name}{UNCONDITIONAL}", name) if name in apart else None
        handles[name] = part(name, name, branch)
    requests = options.limits.running + options.limits.waiting
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name=HTTP,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=requests + _OTHERS,
        max_queued_requests=max(1, options.limits.waiting),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=options.limits.seconds,
    )
    return ingress.bind(options, token, handles, apart)


def options_of(args: Mapping[str, Any]) -> Options:
    """What `build` was told.

    Raises:
        ArgumentError: an option is unknown, missing, or of another type.
    """
    limits = args.get("limits", {})
    for where, given, kind in (("args", args, Options), ("limits", limits, Limits)):
        known = [one.name for one in fields(kind) if one.name != "batch"]  # parts run requests one by one
        if not isinstance(given, Mapping) or not set(known).issuperset(given):
            raise ArgumentError(where, "unknown options", got=given, expected=f"of {', '.join(known)}")
    try:
        return msgspec.convert({**args, "limits": {"running": _RUNNING, **limits}}, Options, strict=False)
    except msgspec.ValidationError as error:
        raise ArgumentError("args", str(error)) from error


def _token(options: Options) -> str | None:
    """What requests have to bring by the environment, where no file says it.

    Who is to let everybody ask has to say so: the machines stand in a network.
    """
    if options.token_file is not None:
        return None
    token = token_in_environment(TOKEN)
    if token is None:
        remedy = f"Put one into ${TOKEN} or a file for token_file; token_file=none lets everybody ask."
        raise ArgumentError("token_file", "there is no token", remedy=remedy)
    return token


def _on_gpu(target: Target) -> bool:
    return target.backend in ENGINES_ONLY or target.device == "cuda"
