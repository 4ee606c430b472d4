"""LoRAs of requests: their files, read once, and which components of a bundle they change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from .binding import Conditioning
from .bundle import Bundle
from .errors import CheckpointError, RequestError
from .lora_files import Lora, read_lora
from .lora_names import PartName, text_part
from .lora_slots import Adapter, LowRank
from .onnx_files import projections
from .safetensors_files import listed
from .tensors import spec_of
from .variant import MAX_LORA_RANK, MAX_LORA_SLOTS, PLAIN, Variant

KEPT_FILES = MAX_LORA_SLOTS
_FUSE = "Fuse it at export with `tandemrt export --lora`."
_OTHER_BASE = "Give it to a bundle of the base model that it was trained on."

Changes = Mapping[str, LowRank]
Wanted = Mapping[Path, float]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request's LoRAs by the components that they change, in its order; components without any are not listed.

    in_weights: the components whose engines are to hold them in their weights, for want of some with slots.
    """

    adapters: Mapping[str, tuple[Adapter, ...]] = field(default_factory=lambda: MappingProxyType({}))
    in_weights: frozenset[str] = frozenset()

    def in_slots(self, component: str) -> tuple[Adapter, ...]:
        """The LoRAs of a component that its engine's slots take."""
        return () if component in self.in_weights else self.adapters.get(component, ())

    @property
    def weights(self) -> dict[str, tuple[Adapter, ...]]:
        """The LoRAs that engines are to hold in their weights, by component."""
        return {name: own for name, own in self.adapters.items() if name in self.in_weights}

    def variant(self, component: str) -> Variant:
        """The engines that a component needs: as many slots as these take LoRAs, of the largest rank among them."""
        own = self.in_slots(component)
        return Variant(lora_slots=len(own), lora_rank=max(one.rank for one in own)) if own else PLAIN

    def beside(self, conditioning: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        """The conditioning of each denoiser with the LoRAs in its slots."""
        return {name: replace(given, adapters=self.in_slots(name)) for name, given in conditioning.items()}

    @property
    def applied(self) -> dict[str, tuple[str, ...]]:
        """The components that each LoRA changes."""
        found: dict[str, tuple[str, ...]] = {}
        for component, own in self.adapters.items():
            for adapter in own:
                found[adapter.name] = (*found.get(adapter.name, ()), component)
        return found


@dataclass(frozen=True)
class _File:
    """A LoRA's file as it was when `stamp` was taken, and its changes of the components it was fitted to so far.

    Of a component that it does not fit there is the reason instead.
    """

    lora: Lora
    stamp: tuple[int, ...]
    changes: dict[str, Changes | str]


class Loras:
    """The LoRAs of a bundle's requests, each file read once until it changes; safe to share between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def fitted(self, wanted: Wanted, denoisers: Iterable[str], *, encodes: bool) -> Fitted:
        """Which of the components that will run each LoRA changes.

        A LoRA is of a text encoder's or of a denoiser's modules, or of both. All of a text encoder's must be there. Of
        the denoisers it changes those that have all of its modules, and leaves out the others, such as a hybrid plan's
        small one; it is refused where there is none.

        denoisers: those of the plan. encodes: whether the text encoders run.

        Raises:
            RequestError: a LoRA fits no denoiser, or not its text encoder; it changes nothing that runs; its rank is
                larger than slots can be.
            CheckpointError: a file is no LoRA, one of a kind that is not supported, or damaged.
        """
        found: dict[str, list[Adapter]] = {}
        names = tuple(dict.fromkeys(denoisers))
        with self._lock:
            for path, scale in wanted.items():
                file = self._file(path)
                changed = {**self._text_encoders(path, file), **self._denoisers(path, file, names)}
                running = [name for name in changed if encodes or name in names]
                if not running:
                    what = "changes text encoders alone, and embeddings are given in their place"
                    raise RequestError(f"loras: {path}", what, remedy="Give prompts, or leave the LoRA out.")
                for name in running:
                    adapter = Adapter(str(path), changed[name], scale, file.stamp)
                    found.setdefault(name, []).append(adapter)
        return Fitted({name: tuple(own) for name, own in found.items()})

    def _file(self, path: Path) -> _File:
        file = self._files.pop(path, None)
        stamp = _stamp(path)
        if file is None or file.stamp != stamp:
            file = _File(read_lora(path), stamp, {})
            largest = max(update.rank for update in file.lora.updates)
            if largest > MAX_LORA_RANK:
                expected = f"at most {MAX_LORA_RANK}"
                raise RequestError(f"loras: {path}", "rank", got=largest, expected=expected, remedy=_FUSE)
        self._files[path] = file
        while len(self._files) > KEPT_FILES:
            self._files.popitem(last=False)
        return file

    def _text_encoders(self, path: Path, file: _File) -> dict[str, Changes]:
        parts = dict.fromkeys(part for update in file.lora.updates if (part := text_part(update.module)) is not None)
        changed: dict[str, Changes] = {}
        for part in parts:
            changes = self._changes(file, part, part)
            if isinstance(changes, str):
                raise RequestError(f"loras: {path}", changes, remedy=_OTHER_BASE)
            changed[part] = changes
        return changed

    def _denoisers(self, path: Path, file: _File, names: Sequence[str]) -> dict[str, Changes]:
        if all(text_part(update.module) is not None for update in file.lora.updates):
            return {}
        results = {}
        for name in names:
            takes_sample = spec_of(self._bundle.component(name).inputs, "sample") is not None
            results[name] = self._changes(file, name, "unet" if takes_sample else "transformer")
        changed = {name: changes for name, changes in results.items() if not isinstance(changes, str)}
        if not changed:
            reasons = "; ".join(str(reason) for reason in results.values())
            raise RequestError(f"loras: {path}", f"fits no denoiser of the plan: {reasons}", remedy=_OTHER_BASE)
        return changed

    def _changes(self, file: _File, component: str, part: PartName) -> Changes | str:
        """What a LoRA changes in a component, or why it does not fit it."""
        if component not in file.changes:
            file.changes[component] = self._computed(file.lora, component, part)
        return file.changes[component]

    def _computed(self, lora: Lora, component: str, part: PartName) -> Changes | str:
        about = part if part.startswith("text_encoder") else None
        own = [update for update in lora.updates if text_part(update.module) == about]
        if component not in self._bundle.manifest.components:
            return f"the bundle has no {component}, which {len(own)} of its updates are for"
        # A graph may name its modules within the model that holds them, as SD3's transformer does.
        modules = {module.removeprefix(f"{part}."): module for module in self._modules(component)}
        shapes = {name: self._modules(component)[module] for name, module in modules.items()}
        try:
            matched = lora.matched(shapes, part)
        except CheckpointError as error:
            return f"{component}: {error.without_remedy}"
        left = {update.module for update in own} - {update.module for update in matched.values()}
        if left:
            return f"{component} has no {listed(left)} ({len(left)} of {len(own)} updates)"
        return {modules[name]: lora.factors(update) for name, update in matched.items()}

    def _modules(self, component: str) -> dict[str, tuple[int, ...]]:
        if component not in self._shapes:
            self._shapes[component] = projections(self._bundle.model_path(component))
        return self._shapes[component]


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file, or the files in a folder of peft's, from those that were under the name before.

    Raises:
        CheckpointError: there is none.
    """
    stamp: list[int] = []
    try:
        for file in (path, *sorted(path.glob("adapter_*"))):
            status = file.stat()
            stamp += [status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev]
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", remedy="Check the path.") from error
    return tuple(stamp)
