"""What a bundle's models were given while they painted: a safetensors file for each prompt, and a record of all.

    <folder>/trajectories.jsonl         what was collected and how, then a line for each file, with its digest
    <folder>/prompt-00000.safetensors   tensors "<component>/<run>/<input>"

A folder is complete when every prompt has its file.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..runtime.bundle import Bundle
from ..runtime.errors import CalibrationError
from ..runtime.files import file_sha256
from ..runtime.manifest import Frozen, Manifest
from ..runtime.safetensors_files import read_header, write_safetensors
from .ledger import read_ledger
from .strata import evenly, place

FORMAT = 1
RECORD_NAME = "trajectories.jsonl"
FILE_NAMES = r"prompt-[0-9]{5}\.safetensors"
AGAIN = "Run the same `tandemrt calibrate collect` again: it makes what is missing."

BRANCHES = ("conditional", "unconditional")

Array = npt.NDArray[Any]


class KeptFile(Frozen, frozen=True, kw_only=True):
    """A prompt's file. runs: by component the `place` of each run that is kept, 0 of what is no denoiser."""

    size: int
    sha256: str
    runs: dict[str, tuple[int, ...]]


class Record(Frozen, frozen=True, kw_only=True):
    """What was collected, and how.

    bundle: its digest. models: of the components visited and of what decides what they are given; see `models_digest`.
    components: those that are visited. settings: what else decides the files' content. versions: by package.
    files: by name, in the prompts' order; those that are there yet.
    """

    format: int = FORMAT
    bundle: str
    models: str
    components: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    prompts: tuple[str, ...]
    prompts_sha256: str
    files: dict[str, KeptFile]


@dataclass(frozen=True, slots=True)
class Run:
    """What a model was given in one run, by input; of a denoiser also the row, its time step and guidance's branch.

    branch: by its index in BRANCHES.
    """

    component: str
    inputs: Mapping[str, Array]
    row: int | None = None
    timestep: float | None = None
    branch: int = 0


@dataclass(frozen=True)
class Trajectories:
    """A complete folder of trajectories, which fit a bundle. digest: of the record, and so of everything."""

    folder: Path
    record: Record
    digest: str
    _manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, bundle: Bundle) -> Trajectories:
        """Read a folder's record and look for its files; what they hold is checked when it is read.

        They fit every bundle whose models are from the same checkpoints and take the same inputs, in whatever precision
        and with whatever defaults.

        Raises:
            CalibrationError: no trajectories, of another bundle, unfinished, or a file is missing or of another size.
        """
        folder = Path(folder)
        found = read_record(folder)
        if found is None:
            remedy = f"Make them: `tandemrt calibrate collect {bundle.path} --prompts FILE --out {folder}`."
            raise CalibrationError(str(folder), f"holds no trajectories: no {RECORD_NAME}", remedy=remedy)
        record, digest = found
        _require_bundle(folder, record, bundle)
        if len(record.files) < len(record.prompts):
            got, expected = len(record.files), f"those of {len(record.prompts)} prompts"
            raise CalibrationError(str(folder), "unfinished: how many files", got=got, expected=expected, remedy=AGAIN)
        for name, kept in record.files.items():
            _require_size(folder / name, kept)
        return cls(folder, record, digest, bundle.manifest)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What was painted."""
        return self.record.prompts

    def count(self, component: str) -> int:
        """How many runs of a component are kept; raises as `samples`."""
        return len(self._places(self._kept_as(component)))

    def samples(self, component: str, most: int | None = None) -> Iterator[dict[str, Array]]:
        """What a component was given in each kept run, by input; one file at a time is read, and checked.

        All decoders of a bundle are given the same. Called again it begins anew.

        most: how many runs at most, even over time steps, branches and prompts; see `evenly`.

        Raises:
            CalibrationError: nothing of the component is kept; and while reading: a file is missing or damaged.
        """
        kept_as = self._kept_as(component)
        places = self._places(kept_as)
        return self._read(kept_as, frozenset(evenly(places, len(places) if most is None else most)))

    def _places(self, kept_as: str) -> tuple[int, ...]:
        return tuple(place for kept in self.record.files.values() for place in kept.runs.get(kept_as, ()))

    def _read(self, kept_as: str, chosen: frozenset[int]) -> Iterator[dict[str, Array]]:
        begin = 0
        for name, kept in self.record.files.items():
            end = begin + len(kept.runs.get(kept_as, ()))
            wanted = [index - begin for index in range(begin, end) if index in chosen]
            if wanted:
                yield from _read_runs(self.folder / name, kept, kept_as, wanted)
            begin = end

    def _kept_as(self, component: str) -> str:
        """The component under whose name the inputs of this one are kept."""
        visited, role = self.record.components, self._manifest.components.get(component)
        kept_as = component
        if component not in visited and role is not None and role.role == "vae_decoder":
            kept_as = next((name for name in visited if name in self._manifest.names("vae_decoder")), component)
        if kept_as in visited:
            return kept_as
        remedy = f"Collect with `--denoiser {component}`, in another folder."
        raise CalibrationError(
            str(self.folder),
            f"nothing is kept of {component}",
            expected=f"one of {', '.join(visited)}",
            remedy=remedy if component in self._manifest.names("denoiser") else "",
        )


def models_digest(manifest: Manifest, components: Sequence[str]) -> str:
    """A sha256 over these components' sources and inputs, and over what decides what they are given."""
    facts = {
        "components": {
            name: (manifest.components[name].source.sha256, manifest.components[name].inputs)
            for name in sorted(components)
            if name in manifest.components
        },
        "latent": manifest.latent,
        "text": manifest.text,
        "scheduler": manifest.scheduler,
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


def read_record(folder: Path) -> tuple[Record, str] | None:
    """A folder's record, its files in the prompts' order, with a sha256 over it; None where there is none.

    Raises:
        CalibrationError: it cannot be read, is no record, or one of a newer format.
    """
    path, remedy = folder / RECORD_NAME, "Collect them anew, with --discard."
    found = read_ledger(path)
    if found is None:
        return None
    ground, files = found
    if ground.get("format") != FORMAT:
        raise CalibrationError(str(path), "format", got=ground.get("format"), expected=str(FORMAT), remedy=remedy)
    try:
        record = msgspec.convert({**ground, "files": dict(sorted(files.items()))}, Record)
    except msgspec.ValidationError as error:
        raise CalibrationError(str(path), f"not a record of trajectories ({error})", remedy=remedy) from error
    odd = record.files.keys() - set(map(file_name, range(len(record.prompts))))
    if odd:
        raise CalibrationError(str(path), "a file that belongs to no prompt", got=min(odd), remedy=remedy)
    return record, hashlib.sha256(msgspec.json.encode(record, order="deterministic")).hexdigest()


def file_name(prompt: int) -> str:
    """The name of the file of the prompt of this index."""
    return f"prompt-{prompt:05d}.safetensors"


def encoded_runs(runs: Sequence[Run], facts: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, ...]]]:
    """A prompt's runs as a safetensors file, facts about them in its header; and by component their places."""
    places: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, Array] = {}
    told = []
    for run in runs:
        before = places.get(run.component, ())
        places[run.component] = (*before, 0 if run.row is None else place(run.row, run.branch))
        tensors |= {f"{run.component}/{len(before)}/{name}": values for name, values in run.inputs.items()}
        told.append([run.component, run.row, run.timestep, None if run.row is None else BRANCHES[run.branch]])
    stream = io.BytesIO()
    write_safetensors(stream, tensors, {**facts, "runs": json.dumps(told)})
    return stream.getvalue(), places


def _require_bundle(folder: Path, record: Record, bundle: Bundle) -> None:
    if record.models == models_digest(bundle.manifest, record.components):
        return
    raise CalibrationError(
        str(folder),
        "trajectories of another bundle",
        got=record.bundle,
        expected=f"{bundle.digest}, or another of the same checkpoints",
        remedy="Collect them with this bundle, in another folder.",
    )


def _require_size(path: Path, kept: KeptFile) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise CalibrationError(str(path), what, remedy=AGAIN) from error
    if size != kept.size:
        raise CalibrationError(str(path), "damaged: size", got=size, expected=f"{kept.size} bytes", remedy=AGAIN)


def _read_runs(path: Path, kept: KeptFile, component: str, runs: Sequence[int]) -> Iterator[dict[str, Array]]:
    """The inputs of some of a component's runs in a file, which is checked first."""
    _require_size(path, kept)
    got = file_sha256(path)
    if got != kept.sha256:
        raise CalibrationError(str(path), "damaged: sha256", got=got, expected=kept.sha256, remedy=AGAIN)
    file = read_header(path)
    for index in runs:
        prefix = f"{component}/{index}/"
        yield {
            name.removeprefix(prefix): np.asarray(file.array(name)) for name in file.shapes if name.startswith(prefix)
        }
