"""A bundle's models on a target: loaded when they are first needed, kept, and run by what they do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .architecture import usable_cpus
from .backends import streams_for
from .backends.base import Array, Handed, Handing, Session, Shape
from .build_commands import build_command
from .bundle import Bundle
from .engine_search import engines_of
from .engine_session import Loader, engine_target
from .errors import BundleError, EngineError, ExecutionError, NonFiniteError, UntrustedError
from .foreseen_engines import foreseen_engines
from .images import Float32, pixels_from_decoded
from .loras import Fitted
from .observed import Observe, ObservedSession
from .ran_on import Ran, serving
from .refits import Refits
from .stage_engines import find_stages
from .step_row import LATENT_SAMPLE
from .targets import ENGINES_ONLY, Target
from .tensors import ENCODED
from .text import CACHED_PROMPTS, DroppedText, Embeddings, PromptEncoder, joined, merged
from .trace import span
from .variant import PLAIN, Variant

_LoaderKey = tuple[str, int | None, int, int]


class Models:
    """The models of a bundle; safe to share between threads."""

    def __init__(
        self, bundle: Bundle, target: Target, threads: int | None, cache: Path, observe: Observe | None = None
    ) -> None:
        """observe: told of every run of a component as it was exported; none is saved by what ran before, then."""
        self.threads = threads
        self._observe = observe
        self._bundle, self._target, self._cache = bundle, target, cache
        self._lock = threading.RLock()
        # On a GPU each, the first for all that is not told otherwise.
        self._targets = tuple(replace(target, gpus=(gpu,)) for gpu in target.gpus)
        self._sessions: dict[tuple[str, Variant, bool, int | None, int, int], Session] = {}
        self._stages: dict[tuple[str, tuple[int, ...], Shape], tuple[Variant, ...]] = {}
        self._foreseen: set[tuple[str, Variant, Shape, bool, int]] = set()
        self._loaders: dict[_LoaderKey, Loader] = {}
        self._uses: dict[_LoaderKey, int] = {}
        self._engines: dict[tuple[str, Variant], tuple[str, ...]] = {}
        self._encoders: dict[Session, tuple[PromptEncoder, Ran]] = {}
        self.refits = Refits(bundle)
        # Stands for a second device; see `Pipeline.open`.
        self.elsewhere: Callable[[str], Session] | None = None
        self.closed = False

    def close(self) -> None:
        """Free the models; a second call does nothing, none can be had after it."""
        with self._lock:
            self.closed = True
            for loader in self._loaders.values():
                loader.close()
            self.refits.close()
            self._loaders.clear()
            self._sessions.clear()
            self._encoders.clear()

    def require_open(self) -> None:
        """Raise ExecutionError when the models are closed."""
        if self.closed:
            raise ExecutionError("pipeline", "used after it was closed", remedy="Open it again.")

    @property
    def observed(self) -> bool:
        """Whether somebody is told of what models are given, on the host."""
        return self._observe is not None

    @property
    def devices(self) -> int:
        """How many devices there are to run on here."""
        return len(self._targets)

    @property
    def apart(self) -> bool:
        """Whether both branches of guidance have a device of their own."""
        return self.elsewhere is not None or self.devices > 1

    def session(
        self,
        name: str,
        variant: Variant = PLAIN,
        *,
        refit: bool = False,
        calls: int = 1,
        workers: int = 1,
        device: int = 0,
    ) -> Session:
        """The component `name`, loaded, on engines of another variant where one is named.

        refit: on such as can be refitted alone, in a generation that has its turn; see `Turns`.
        calls: how many run at once for one generation. Where a backend must be told when it loads a model, what is made
            for two is another session, with weights of its own.
        workers: how many runs there are at once, of this model and of others beside it, among which a CPU's threads are
            divided: each has one at least.
        device: which of the devices; on each a model has weights of its own. The second may be elsewhere.

        Raises:
            BundleError: its files are no longer what the manifest says, or its tensors never were.
            EngineError: there is no engine of the variant.
            ExecutionError: the models are closed, or it cannot be loaded.
        """
        with self._lock:
            self.require_open()
            if device and self.elsewhere is not None:
                return self.elsewhere(name)
            streams = streams_for(self._target, calls)
            threads = self._threads(workers, streams)
            key = name, variant, refit, threads, streams, device
            if key not in self._sessions:
                self._sessions[key] = self._opened(*key)
            self._loader(name, threads, streams, device).overlap(max(calls, workers))
            used = name, threads, streams, device
            self._uses[used] = self._uses.get(used, 0) + 1
            return self._sessions[key]

    def engines(self, name: str, variant: Variant = PLAIN) -> tuple[str, ...]:
        """The keys of the engines that may run a component as a variant, on any of the devices.

        The cache is looked through when this is first asked, or when the component is first loaded so: what is built
        later is found by those who open the bundle anew.

        Raises:
            EngineError: as of `cached_engines`.
            TargetError: the target cannot run here.
        """
        with self._lock:
            if (name, variant) not in self._engines:
                targets = [engine_target(self._bundle, name, target) for target in self._targets]
                found = [one for target in targets for one in engines_of(self._bundle, name, target, cache=self._cache)]
                self._engines[name, variant] = tuple(
                    sorted(
                        {
                            folder.name
                            for folder, engine, misfit in found
                            if misfit is None and engine.ingredients.variant.serves(variant)
                        }
                    )
                )
            return self._engines[name, variant]

    def uses(self) -> Mapping[_LoaderKey, int]:
        """How often sessions of each loader that is here were asked for."""
        with self._lock:
            return dict(self._uses)

    def release(self, unused: Mapping[_LoaderKey, int]) -> None:
        """Let go of loaders that nobody has asked for since: who runs on them still has them until he is done.

        Engines on a GPU stay: they are freed by being closed, which those who run on them would not survive.
        """
        if self._target.backend in ENGINES_ONLY:
            return
        with self._lock:
            gone = {key for key, uses in unused.items() if self._uses.get(key) == uses}
            for key in gone:
                self._loaders.pop(key, None)
                del self._uses[key]
            kept = self._sessions.items()
            self._sessions = {key: one for key, one in kept if (key[0], *key[3:]) not in gone}

    def require_engine(
        self, name: str, variant: Variant, shape: Shape, *, refit: bool = False, device: int = 0
    ) -> None:
        """Check that a GPU has an engine for calls of a component, by what is known before any; graphs take all calls.

        variant, refit, device: as of `session`. shape: as of `foreseen_engines`. What was found once is not looked for
        again.

        Raises:
            EngineError: there is none.
        """
        key = name, variant, shape, refit, device
        with self._lock:
            if self._target.backend not in ENGINES_ONLY or key in self._foreseen:
                return
            target = engine_target(self._bundle, name, self._targets[device])
            where = f"{name} on GPU {target.gpus[0]}" if self.devices > 1 else name
            try:
                found = foreseen_engines(self._bundle, name, target, shape, cache=self._cache, variant=variant)
            except UntrustedError:
                raise
            except EngineError as error:
                raise EngineError(where, error.what, remedy=error.remedy) from error
            if refit and not any(one.ingredients.refittable for one in found):
                command = build_command(self._bundle, name, target, variant, {"noise": shape}, self._cache)
                what = "no engine that can be refitted, which its LoRAs need"
                raise EngineError(where, what, remedy=f"Run `{command} --refit`.")
            self._foreseen.add(key)

    def require_stages(self, name: str, devices: tuple[int, ...], shape: Shape) -> tuple[Variant, ...]:
        """See `find_stages`; what was found once is not looked for again.

        devices: of each stage, as of `session`.
        """
        with self._lock:
            key = name, devices, shape
            if key not in self._stages:
                targets = [engine_target(self._bundle, name, self._targets[device]) for device in devices]
                self._stages[key] = find_stages(self._bundle, name, targets, shape, cache=self._cache)
            return self._stages[key]

    def _threads(self, workers: int, streams: int) -> int | None:
        """How many CPU threads a session of so many streams has, where so many runs share them; None for all."""
        if workers == 1 or self._target.backend in ENGINES_ONLY:
            return self.threads
        return max(1, (self.threads or usable_cpus()) // workers) * streams

    def _opened(
        self, name: str, variant: Variant, refit: bool, threads: int | None, streams: int, device: int
    ) -> Session:
        self._bundle.check_component(name)
        self.engines(name, variant)
        session = self._loader(name, threads, streams, device).session(variant, refit=refit)
        if variant != PLAIN:
            return session
        try:
            self._bundle.check_tensors(name, session.inputs, session.outputs)
        except BundleError:
            self._loaders.pop((name, threads, streams, device)).close()
            raise
        return session if self._observe is None else ObservedSession(name, session, self._observe)

    def _loader(self, name: str, threads: int | None, streams: int, device: int) -> Loader:
        """The loader of these: of what is wanted of engines much is served by the same ones, which are loaded once."""
        key = name, threads, streams, device
        if key not in self._loaders:
            self._loaders[key] = Loader(self._bundle, name, self._targets[device], threads, streams, self._cache)
            self._loaders[key].refits = self.refits
        return self._loaders[key]

    def encode_texts(
        self, loras: Fitted, prompts: Sequence[Sequence[str]], *, strict: bool, before: Callable[[], None], ran: Ran
    ) -> tuple[Embeddings, tuple[DroppedText, ...]]:
        """What the text encoders make of prompts, a list for each in their order, joined, and the text that was cut.

        before: called before an encoder is loaded and before each prompt; what it raises ends the encoding.
        ran: told what they run on.
        """
        text = self._bundle.manifest.text
        parts: list[Embeddings] = []
        dropped: list[tuple[str, DroppedText]] = []
        held = loras.weights
        for name, texts in zip(text.encoders, prompts, strict=False):
            before()
            encoder, on = self._text_encoder(name, loras)
            part, cut = encoder.encode(
                texts, loras.in_slots(name), held=held.get(name, ()), strict=strict, before=before
            )
            ran.join(on)
            parts.append(part)
            dropped += [(name, one) for one in cut]
        return joined(text, parts), merged(dropped)

    def _text_encoder(self, name: str, loras: Fitted) -> tuple[PromptEncoder, Ran]:
        """A text encoder, which binds its session once, and what that runs on."""
        with self._lock:
            tokens = self._bundle.manifest.text.encoders[name].max_length
            session = self.session(name, loras.variant(name), refit=name in loras.in_weights)
            session = serving(session, {"input_ids": (1, tokens)})
            if session not in self._encoders:
                ran = Ran()
                kept = CACHED_PROMPTS if self._observe is None else 0
                encoder = PromptEncoder(self._bundle, name, ran.watched(name, session), cached_prompts=kept)
                self._encoders[session] = encoder, ran
            return self._encoders[session]

    def encode_pictures(self, encoder: str, pictures: Float32, *, before: Callable[[], None], ran: Ran) -> Float32:
        """What a VAE's encoder makes of (N, 3, H, W) float32 in [-1, 1], one picture at a time, which bounds memory.

        before: called before each picture; what it raises ends the encoding. ran: told what it runs on.

        Raises:
            BundleError: what it makes is not of the latent's size.
            ExecutionError: it failed, or returned NaN or Inf.
        """
        session = ran.watched(encoder, self.session(encoder))
        binding = session.bind({"sample": (1, *pictures.shape[1:])})
        (output,) = (spec.name for spec in session.outputs if spec.name in ENCODED)
        space = self._bundle.manifest.latent
        sides = [side // space.downsampling for side in pictures.shape[2:]]
        expected, got = (1, ENCODED[output] * space.channels, *sides), binding.outputs[output].shape
        if got != expected:
            raise BundleError(encoder, f"shape of {output}", got=got, expected=str(expected))
        encoded = []
        for picture in pictures:
            before()
            binding.inputs["sample"][0] = picture
            with span("model", encoder):
                binding.run()
            _require_finite(encoder, binding.outputs[output], output)
            encoded.append(binding.outputs[output][0].copy())
        ran.lease.give_back(binding)
        return np.stack(encoded)

    def decode(
        self,
        decoder: str,
        latents: Float32,
        *,
        before: Callable[[], None],
        ran: Ran,
        scaled: Handing | None = None,
    ) -> Iterator[Float32]:
        """Decode (B, C, h, w) one picture at a time, which bounds memory: (H, W, 3) float32 in [0, 1] each.

        before: called before each picture; what it raises ends the decoding. ran: told what it runs on.
        scaled: a step or update engine's binding whose `latent_sample` is what the decoder is given, where it lies
            there already.

        Raises:
            ExecutionError: the decoder failed, or returned NaN or Inf.
        """
        space = self._bundle.manifest.latent
        session = ran.watched(decoder, self.session(decoder))
        binding = session.bind({"latent_sample": (1, *latents.shape[1:])})
        if isinstance(binding, Handing):
            binding.leave(["latent_sample"] if scaled is not None else [])
        for index, latent in enumerate(latents):
            before()
            if scaled is not None and isinstance(binding, Handing):
                binding.take([Handed("latent_sample", scaled, LATENT_SAMPLE, index)])
            else:
                np.divide(latent, space.scaling_factor, out=binding.inputs["latent_sample"][0])
                binding.inputs["latent_sample"][0] += space.shift_factor
            with span("model", decoder):
                binding.run()
            _require_finite(decoder, binding.outputs["sample"], "the picture")
            yield pixels_from_decoded(binding.outputs["sample"])[0]
        ran.lease.give_back(binding)


def _require_finite(name: str, values: Array, what: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(name, f"NaN or Inf in {what}", remedy="If it is fp16, export it as fp32.")
