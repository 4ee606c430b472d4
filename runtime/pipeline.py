"""The pipeline: a bundle opened on a target, and what a call makes of a request."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from .arguments import thread_count
from .backends import open_session
from .backends.base import Session
from .bundle import Bundle
from .conditioning import check_conditioning, conditioned
from .errors import BundleError, CancelledError, ExecutionError, RequestError, TandemError
from .images import Float32, image_from_pixels, pixels_from_decoded
from .noise import Noise
from .output import Output, RowTiming, StepEvent, Timings
from .plan import Plan, compile_plan
from .request import Request
from .request_checks import checked_array, require_known
from .sampler import Sampler
from .targets import Target, check_installed, check_runnable, parse_target
from .text import DroppedText, Embeddings, PromptEncoder, joined, merged

P = ParamSpec("P")
R = TypeVar("R")


class Stream(Iterator[StepEvent]):
    """Events of a running generation, one a row; `result` gives what it made.

    One thread iterates or asks for the result; any may cancel: the loop over the events then ends with CancelledError,
    as it ends with any other error of the generation.
    """

    def __init__(self, events: Callable[[threading.Event], Generator[StepEvent, None, Output]]) -> None:
        self._cancelled = threading.Event()
        self._events = events(self._cancelled)
        self._output: Output | None = None
        self._failure: TandemError | None = None

    def __next__(self) -> StepEvent:
        try:
            return next(self._events)
        except StopIteration as end:
            self._output = self._output or end.value
            raise
        except TandemError as failure:
            self._failure = failure
            raise

    def result(self) -> Output:
        """Run the rows that are left, if any, and return the output.

        Raises:
            CancelledError: it was cancelled, now or before.
            TandemError: it failed, now or before.
        """
        for _ in self:
            pass
        if self._failure is not None:
            raise self._failure
        if self._output is None:
            raise ExecutionError("generation", "has no result: it was interrupted", remedy="Start it again.")
        return self._output

    def cancel(self) -> None:
        """Stop after the row that is running, or before the first, from any thread.

        Asking for the next event, or for the result, then raises CancelledError; so does a loop that is under way.
        """
        self._cancelled.set()


def _takes_request(
    make: Callable[P, Request],
) -> Callable[[Callable[[Pipeline, Request], R]], Callable[Concatenate[Pipeline, P], R]]:
    """Let a method of a request be called with the request's own arguments."""

    def decorate(method: Callable[[Pipeline, Request], R]) -> Callable[Concatenate[Pipeline, P], R]:
        @functools.wraps(method)
        def call(self: Pipeline, /, *args: P.args, **kwargs: P.kwargs) -> R:
            require_known(kwargs, tuple(parameters))
            return method(self, make(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(make).parameters
        call.__signature__ = inspect.Signature([own, *parameters.values()])  # type: ignore[attr-defined]
        return call

    return decorate


class Pipeline:
    """A bundle on a target. Models load when they are first needed; one pipeline may be used by many threads."""

    def __init__(self, bundle: Bundle, target: Target, threads: int | None) -> None:
        self.bundle, self.target, self._threads = bundle, target, threads
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._encoders: dict[str, PromptEncoder] = {}
        self._closed = False

    @classmethod
    def open(cls, bundle: str | Path, target: str = "auto", *, threads: int | None = None) -> Pipeline:
        """Check a bundle's files and make it ready to run.

        target: `auto`, or backend, device and precision such as `onnxruntime:cpu:fp32`.
        threads: how many CPU threads a model may use; the backend's choice otherwise.

        Raises:
            BundleError: the bundle is damaged, foreign or newer than this runtime.
            ArgumentError: there is no such target, or `threads` is no whole number in 1..1024.
            TargetError: the target is not available here, or names another precision than the bundle has.
        """
        wanted = parse_target(target)
        check_runnable(wanted)
        check_installed(wanted)
        count = thread_count("threads", threads)
        opened = Bundle.open(bundle)
        for name, component in opened.manifest.components.items():
            wanted.check_precision(name, component.precision)
        return cls(opened, wanted, count)

    def __repr__(self) -> str:
        return f"<Pipeline {self.bundle.path} on {self.target}, {'closed' if self._closed else 'open'}>"

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the models; a second call does nothing, a generation after it is refused."""
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    @_takes_request(Request)
    def __call__(self, request: Request) -> Output:
        """Paint pictures; the arguments are those of `Request`.

        Raises:
            RequestError, PlanError: an argument cannot be used; nothing has run.
            ExecutionError: a model failed, or returned NaN or Inf.
        """
        return Stream(functools.partial(self._generate, request)).result()

    @_takes_request(Request)
    def stream(self, request: Request) -> Stream:
        """Paint pictures row by row; the arguments are those of `Request`, the errors those of a call."""
        return Stream(functools.partial(self._generate, request))

    def _generate(self, request: Request, cancelled: threading.Event) -> Generator[StepEvent, None, Output]:
        """Check the request now; what is returned runs it, one event a row."""
        manifest = self.bundle.manifest
        plan = compile_plan(manifest, request.schedule)
        shape = request.latent_shape(manifest, tuple(dict.fromkeys(plan.denoisers)))
        check_conditioning(request, manifest, plan)
        if request.latents is not None:
            checked_array("latents", request.latents, shape)
        decoders = self._decoder(request.decoder), self._decoder(None, tiny=True)
        return self._run(request, plan, Noise(request, shape), decoders, cancelled)

    def _run(
        self, request: Request, plan: Plan, noise: Noise, decoders: tuple[str, str], cancelled: threading.Event
    ) -> Generator[StepEvent, None, Output]:
        _stop_if(cancelled, 0, plan)
        began = time.perf_counter()
        manifest = self.bundle.manifest
        factor = manifest.latent.downsampling
        size = (noise.shape[2] * factor, noise.shape[3] * factor)
        encode = functools.partial(self._encoded, strict=request.strict_prompts)
        conditioning, dropped = conditioned(request, manifest, plan, size, encode)
        text_ms = _since(began)
        sessions = {name: self._session(name) for name in dict.fromkeys(plan.denoisers)}
        sampler = Sampler(plan, sessions, conditioning, noise.draw)
        _stop_if(cancelled, 0, plan)
        state = sampler.start(noise.draw() if request.latents is None else request.latents)
        rows: list[RowTiming] = []
        for done in sampler.run(state):
            rows.append(RowTiming(plan.denoisers[done.row], done.model_ms, done.total_ms))
            wanted = request.previews and (done.row + 1) % request.previews == 0
            preview = _images(self._decode(decoders[1], done.denoised())) if wanted else ()
            step, timestep = int(plan.table.steps[done.row]), float(plan.table.timesteps[done.row])
            yield StepEvent(done.row, plan.table.rows, step, timestep, rows[-1], preview)
            _stop_if(cancelled, done.row + 1, plan)
        decoding = time.perf_counter()
        pixels = () if request.output_type == "latent" else tuple(self._decode(decoders[0], state.latents))
        timings = Timings(text_ms, tuple(rows), _since(decoding), _since(began))
        images = _images(pixels) if request.output_type == "pil" else pixels
        return Output(images, state.latents, timings, plan, noise.seeds, dropped)

    def _encoded(self, prompts: Sequence[Sequence[str]], *, strict: bool) -> tuple[Embeddings, tuple[DroppedText, ...]]:
        """What the text encoders make of prompts, a list for each in their order, joined, and the text that was cut."""
        parts, dropped = [], []
        text = self.bundle.manifest.text
        for name, texts in zip(text.encoders, prompts, strict=False):
            part, cut = self._encoder(name).encode(texts, strict=strict)
            parts.append(part)
            dropped += [(name, one) for one in cut]
        return joined(text, parts), merged(dropped)

    def _encoder(self, name: str) -> PromptEncoder:
        with self._lock:
            if name not in self._encoders:
                self._encoders[name] = PromptEncoder(self.bundle, name, self._session(name))
            return self._encoders[name]

    def _session(self, name: str) -> Session:
        with self._lock:
            if self._closed:
                raise ExecutionError("pipeline", "used after it was closed", remedy="Open it again.")
            if name not in self._sessions:
                self._sessions[name] = self._opened(name)
            return self._sessions[name]

    def _opened(self, name: str) -> Session:
        """A model whose files still are what the manifest says, and whose tensors are."""
        self.bundle.check_component(name)
        session = open_session(self.bundle.model_path(name), self.target, threads=self._threads)
        try:
            self.bundle.check_tensors(name, session.inputs, session.outputs)
        except BundleError:
            session.close()
            raise
        return session

    def _decoder(self, name: str | None, *, tiny: bool = False) -> str:
        """The decoder asked for; without a name the bundle's first, or its tiny one."""
        decoders = self.bundle.manifest.names("vae_decoder")
        if name is None:
            return "vae_decoder_tiny" if tiny and "vae_decoder_tiny" in decoders else decoders[0]
        if name not in decoders:
            raise RequestError("decoder", "unknown", got=name, expected=f"one of {', '.join(decoders)}")
        return name

    def _decode(self, decoder: str, latents: Float32) -> Iterator[Float32]:
        """Decode (B, C, h, w) one picture at a time, which bounds memory: (H, W, 3) float32 in [0, 1] each."""
        space = self.bundle.manifest.latent
        binding = self._session(decoder).bind({"latent_sample": (1, *latents.shape[1:])})
        for latent in latents:
            np.divide(latent, space.scaling_factor, out=binding.inputs["latent_sample"][0])
            binding.inputs["latent_sample"][0] += space.shift_factor
            binding.run()
            decoded = binding.outputs["sample"]
            if not np.isfinite(decoded).all():
                raise ExecutionError(decoder, "NaN or Inf in the picture", remedy="If it is fp16, export it as fp32.")
            yield pixels_from_decoded(decoded)[0]


def _images(pixels: Iterator[Float32] | tuple[Float32, ...]) -> tuple[Image.Image, ...]:
    return tuple(image_from_pixels(picture) for picture in pixels)


def _stop_if(cancelled: threading.Event, rows: int, plan: Plan) -> None:
    if cancelled.is_set():
        raise CancelledError("generation", f"cancelled after row {rows} of {plan.table.rows}")


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
