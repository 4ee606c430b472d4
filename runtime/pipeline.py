"""The pipeline: a bundle opened on a target, and what a call makes of a request."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import thread_count
from .auto_placement import AutoPlacement
from .backends.base import Array
from .bundle import Bundle
from .cache import cache_folder, require_folder
from .cloud import Cloud
from .conditioning import check_conditioning, encoded
from .devices import on_devices, require_devices
from .edge import Edge, names_cloud
from .elsewhere import Elsewhere, ElsewhereSession, run_alone
from .errors import ArgumentError, CancelledError, ExecutionError, RequestError, told_as
from .images import Float32
from .jobs import Jobs
from .lora_engines import LoraEngines
from .loras import Fitted, Loras
from .manifest import Manifest
from .models import Models
from .observed import Observe
from .output import Output
from .overlap import overlapped
from .painting import Job, Painter
from .plan import Plan, compile_plan
from .pool import Pool
from .ran_on import Ran
from .request import Request
from .request_calls import numbered, takes_request
from .step_engines import StepEngines
from .stream import Events, Stream
from .targets import Target, check_installed, check_runnable, parse_target
from .there import There
from .turns import Turns


class Pipeline:
    """A bundle on a target. Models load when they are first needed; one pipeline may be used by many threads."""

    def __init__(
        self,
        bundle: Bundle,
        target: Target,
        threads: int | None,
        cache: Path,
        observe: Observe | None = None,
        cloud: Cloud | None = None,
    ) -> None:
        self.bundle, self.target = bundle, target
        # The cloud's denoisers, where there is a cloud.
        self.there = None if cloud is None else There(cloud, bundle.manifest)
        self._models = Models(bundle, target, threads, cache, observe)
        self._steps = StepEngines(bundle, target, threads, cache, self._models.refits)
        self._jobs = Jobs(bundle, target, self._models, Loras(bundle), LoraEngines(bundle, target, cache))
        self._pool, self._turns = Pool(), Turns(self._models.refits.hold)
        auto = AutoPlacement(bundle, target, threads, cache, self._turns.alone)
        self._painter = Painter(bundle, self._models, self._steps, auto)

    @classmethod
    def open(  # noqa: PLR0913
        cls,
        bundle: str | Path,
        target: str = "auto",
        *,
        threads: int | None = None,
        cache: str | Path | None = None,
        devices: Sequence[int] | None = None,
        observe: Observe | None = None,
        cloud: str | Cloud | None = None,
        token: str | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> Pipeline:
        """Check a bundle's files and make it ready to run.

        target: `auto`, or backend, device and precision such as `onnxruntime:cpu:fp32`: of what is not quantized.
        threads: how many CPU threads a model may use; the backend's choice otherwise.
        cache: the folder where engines and measurements are; `$TANDEMRT_CACHE` otherwise, or the user's own folder for
            caches, neither of which need be there.

        devices: the GPUs that TensorRT's flavours run on, by CUDA's index, the first one otherwise. On the second of
            two run the branch without the prompt and half of a window's stages, in the placements that run both
            branches at once (parallel, hybridiff, auto); everything else runs on the first.
        observe: called before every run of a component, by the thread that runs it, with its name and its inputs by
            name, which the next run overwrites. Not of engines that are more than the component: with LoRAs in slots,
            of its stages, or step engines, of which placement sequential runs none. Update engines are not used.
        cloud: a server of `tandemrt serve`, such as `https://host:8080`, with the token that it wants; or a `Cloud`.
            Its denoisers may then be named in `steps`: `{"cloud:unet": 10, "unet_small": 15}`.
        elsewhere: called instead of a model here for the branch without the prompt in placement `parallel`, of a plan
            that needs no LoRAs; what answers there is `run_component` of another pipeline on the same bundle.

        Raises:
            BundleError: the bundle is damaged, foreign or newer than this runtime.
            ArgumentError: there is no such target, `threads` is no whole number in 1..1024, `cache` is no folder,
                `devices` are not one or two different indices, or given for a target that takes none, or `token` is
                given without an address.
            TargetError: the target or a device is not available here, or names another precision than the bundle has.
        """
        wanted = on_devices(parse_target(target), devices)
        check_runnable(wanted)
        check_installed(wanted)
        if devices is not None:
            require_devices(wanted)
        count = thread_count("threads", threads)
        require_folder(cache)
        if token is not None and not isinstance(cloud, str):
            raise ArgumentError("token", "given without a server's address", remedy="Give `cloud` as an address.")
        opened = Bundle.open(bundle)
        wanted.check_quantized(str(opened.path), opened.manifest)
        for name, component in opened.manifest.components.items():
            wanted.check_precision(name, component.precision)
        server = Cloud(cloud, token) if isinstance(cloud, str) else cloud
        pipeline = cls(opened, wanted, count, cache_folder(cache), observe, server)
        if elsewhere is not None:
            components = opened.manifest.components.items()
            there = {name: ElsewhereSession(name, component, elsewhere) for name, component in components}
            pipeline._models.elsewhere = there.__getitem__
        return pipeline

    def __repr__(self) -> str:
        target = self.target.told(self.bundle.manifest)
        return f"<Pipeline {self.bundle.path} on {target}, {'closed' if self._models.closed else 'open'}>"

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest; where there is a cloud, with its denoisers too, as `cloud:` and their names."""
        return self.bundle.manifest if self.there is None else self.there.manifest

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the models; a second call does nothing, a generation after it is refused.

        Generations that are running end with CancelledError after the call of a model that each is at, or at once where
        they wait for the cloud.
        """
        if self.there is not None:
            self.there.close()
        self._pool.close()  # first: what is bound keeps a model alive
        self._models.close()
        self._steps.close()

    @takes_request(Request)
    def __call__(self, request: Request) -> Output:
        """Paint pictures; the arguments are those of `Request`.

        Raises:
            RequestError, PlanError: an argument cannot be used; nothing has run.
            TargetError: the target cannot place the branches of guidance as asked; nothing has run.
            CheckpointError: a LoRA's file is damaged, or of a kind that is not supported; nothing has run.
            EngineError: no engine takes the LoRAs or the branches by themselves, or is a stage that is needed, and
                nothing has run; or one that is needed is missing.
            ExecutionError: a model failed, or returned NaN or Inf.
        """
        return Stream(functools.partial(self._generate, request, at_once=True)).result()

    @takes_request(Request)
    def stream(self, request: Request) -> Stream:
        """Paint pictures row by row; the arguments are those of `Request`, the errors those of a call."""
        return Stream(functools.partial(self._generate, request))

    def stream_planned(self, request: Request, plan: Plan) -> Stream:
        """As `stream`, of a request whose plan, by `compile_plan` of its schedule for this bundle, is there already."""
        return Stream(functools.partial(self._generate, request, plan=plan))

    def map(self, requests: Iterable[Request | Mapping[str, Any]]) -> Iterator[Output]:
        """Paint one request after the other, each a `Request` or its arguments; their parts overlap.

        While one's rows run, the next one's texts are encoded and the last one's pictures decoded, on a thread each.
        The pictures are those of calls. A request is taken when there is room for it: three at most are under way.

        Raises:
            TandemError: as a call, in the request's turn, with its index where the request cannot be used; it ends the
                iterator, and the requests after it. So does what `requests` itself raises.
        """
        return overlapped(functools.partial(self._numbered, *each) for each in numbered(requests))

    @takes_request(Request)
    def encode_prompt(self, request: Request) -> dict[str, Float32]:
        """What the text encoders make of a request's texts, by the arguments that a call takes instead of them.

        Of both branches, the second where guidance is on: `pipe(**pipe.encode_prompt("red"))` paints as `pipe("red")`.

        Raises:
            RequestError, PlanError, ExecutionError: as a call; RequestError also of LoRAs, which change the encoders.
        """
        self._models.require_open()
        if request.loras:
            raise RequestError("loras", "given to encode_prompt", remedy="Leave them out, or give texts to a call.")
        plan = compile_plan(self.manifest, request.schedule)
        check_conditioning(request, self.manifest, plan)
        encode = functools.partial(
            self._models.encode_texts, Fitted(), strict=request.strict_prompts, before=self._models.require_open,
            ran=Ran(),
        )  # fmt: skip
        embeddings, negative, _ = encoded(request, self.manifest.text, encode, guided=any(plan.guided))
        both = {"prompt_embeds": embeddings.hidden, "pooled_prompt_embeds": embeddings.pooled}
        if negative is not None:
            both |= {"negative_prompt_embeds": negative.hidden, "negative_pooled_prompt_embeds": negative.pooled}
        return {name: values for name, values in both.items() if values is not None}

    def run_component(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One run of a component for a pipeline whose `elsewhere` this is; inputs and outputs by name.

        Raises:
            BundleError: there is none of that name.
            ExecutionError: it failed, or takes other inputs.
        """
        self.bundle.component(name)
        return run_alone(self._models, self._pool, name, inputs)

    def _numbered(self, index: int, request: Request, cancelled: threading.Event) -> Events:
        """As `_generate`, of a request of `map`, whose index is told where it cannot be used."""
        with told_as(f"requests[{index}]"):
            return self._generate(request, cancelled, at_once=True)

    def _generate(
        self, request: Request, cancelled: threading.Event, *, at_once: bool = False, plan: Plan | None = None
    ) -> Events:
        """Check the request now; what is returned runs it, one event a row.

        at_once: whether nobody looks at it between its rows. plan: the request's, where it is there already.
        """
        self._models.require_open()
        if self.there is not None and names_cloud(request.steps):
            paint = functools.partial(self._here, cancelled=cancelled, at_once=at_once)
            return self._until_closed(Edge(self.there, self.bundle, paint, cancelled).events(request))
        return self._here(request, cancelled, at_once=at_once, plan=plan)

    def _here(self, request: Request, cancelled: threading.Event, *, at_once: bool, plan: Plan | None = None) -> Events:
        """As `_generate`, of what runs here alone."""
        job = self._jobs.job(request, self.manifest, plan, at_once=at_once)
        return self._until_closed(self._run(job, cancelled))

    def _run(self, job: Job, cancelled: threading.Event) -> Events:
        """Run a job when it is its turn."""

        def stop() -> None:
            self._models.require_open()
            if cancelled.is_set():
                raise CancelledError("generation", "cancelled while it waited for those with other LoRAs")

        asked = time.perf_counter()
        with self._pool.lease() as lease:
            painted = self._painter.painted(job, cancelled, lease, asked)
            return (yield from self._turns.in_turn(job.loras.weights, painted, stop))

    def _until_closed(self, events: Events) -> Events:
        """The same events; what fails since the pipeline was closed meanwhile is cancelled."""
        try:
            return (yield from events)
        except ExecutionError as error:
            if isinstance(error, CancelledError) or not self._models.closed:
                raise
            raise CancelledError("generation", "the pipeline was closed while it ran") from error
