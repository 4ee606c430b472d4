"""A bundle made of another one with some of its graphs replaced: a copy, published whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType

import msgspec

from ..runtime.bundle import Bundle
from ..runtime.calibrations import CallTime
from ..runtime.engine_files import weights_of
from ..runtime.errors import ArgumentError, BundleError
from ..runtime.manifest import Component, Loss, Quantization
from ..runtime.manifest_files import file_records, write
from ..runtime.onnx_files import external_files
from ..runtime.staging import Staging, writing_failed


class Derived:
    """A bundle in the making, in a folder beside `out`; the bundle that it is made of is only read.

    Raises, on entering:
        ExportError: `out` exists and may not be replaced, cannot be written, or has no room.
    """

    def __init__(self, bundle: Bundle, out: Path, *, force: bool) -> None:
        """force: whether a bundle at `out` may be replaced.

        Raises:
            ArgumentError: `out` is the bundle itself.
        """
        require_another(bundle.path, out)
        self._bundle, self._staging = bundle, Staging(out, force=force)
        self._components: dict[str, Component] = dict(bundle.manifest.components)

    def __enter__(self) -> Derived:
        self._staging.__enter__()
        try:
            for name in self._bundle.manifest.files:
                copy = self.folder / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                # Never a hard link, which would be a second name of the other bundle's file.
                shutil.copyfile(self._bundle.path / name, copy)
        except BaseException as error:
            self._staging.__exit__(None, None, None)
            if isinstance(error, OSError):
                raise writing_failed(self._staging.out, error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._staging.__exit__(kind, error, traceback)

    @property
    def folder(self) -> Path:
        """Where it is made."""
        return self._staging.folder

    def replace(self, name: str, make: Callable[[Path], Quantization]) -> Quantization:
        """Let `make` write another graph of component `name` to a path, with weights beside it, and say what it did.

        May be called again: the last graph counts.

        Raises:
            BundleError: another component has weights in the same files.
            ExportError: the folder cannot be written or is full.
            TandemError: as `make`.
        """
        self._require_own_files(name)
        path = self.folder / self._components[name].model
        try:
            _remove(path)
            quantization = make(path)
        except OSError as error:
            raise writing_failed(self._staging.out, error) from error
        # What was proved at export is not of this graph.
        changed = msgspec.structs.replace(self._components[name], evidence=(), quantization=quantization)
        self._components[name] = changed
        return quantization

    def restore(self, name: str) -> None:
        """Put the graph of component `name` back that the other bundle has.

        Raises:
            ExportError: the folder cannot be written or is full.
        """
        original = self._bundle.model_path(name)
        path = self.folder / self._components[name].model
        try:
            _remove(path)
            for file in {original.name, *weights_of(self._bundle, name)}:
                shutil.copyfile(original.parent / file, path.parent / file)
        except OSError as error:
            raise writing_failed(self._staging.out, error) from error
        self._components[name] = self._bundle.manifest.components[name]

    def tell(self, name: str, losses: Sequence[Loss], speed: CallTime | None = None) -> None:
        """Say what the quantization of component `name` took from pictures, and how long its calls take then."""
        component = self._components[name]
        if component.quantization is None:
            raise ValueError(f"{name}: not replaced")
        quantization = msgspec.structs.replace(component.quantization, losses=tuple(losses), speed=speed)
        self._components[name] = msgspec.structs.replace(component, quantization=quantization)

    def opened(self) -> Bundle:
        """What is there by now, as a bundle that runs.

        Raises:
            BundleError: what was put into it is no part of a bundle.
            ExportError: the folder cannot be written or is full.
        """
        manifest = msgspec.structs.replace(
            self._bundle.manifest,
            producers={**self._bundle.manifest.producers, "tandemrt": metadata.version("tandemrt")},
            components=self._components,
            files=file_records(self.folder),
        )
        try:
            write(manifest, self.folder)
        except OSError as error:
            raise writing_failed(self._staging.out, error) from error
        return Bundle.open(self.folder)

    def publish(self) -> Bundle:
        """Check it once more, put it in the place of `out` in one step, and open it there.

        Raises:
            BundleError, ExportError: as `opened`; or `out` came into being meanwhile.
        """
        self.opened()
        self._staging.publish()
        return Bundle.open(self._staging.out)

    def _require_own_files(self, name: str) -> None:
        """Raise BundleError when a file of a component's weights is another's too: bundles of other tools may do so."""
        folder = Path(self._components[name].model).parent
        own = {folder / file for file in weights_of(self._bundle, name)}
        for other, component in self._bundle.manifest.components.items():
            theirs = {Path(component.model).parent / file for file in weights_of(self._bundle, other)}
            if other != name and not own.isdisjoint(theirs):
                raise BundleError(str(self._bundle.path), f"{name} and {other} share a file of weights")


def _remove(model: Path) -> None:
    """Remove a graph, where there is one, and its weights."""
    for file in {model.name, *(external_files(model) if model.exists() else ())}:
        (model.parent / file).unlink(missing_ok=True)


def require_another(bundle: Path, out: Path) -> None:
    """Raise ArgumentError where what is made of a bundle would take its place."""
    if out.exists() and out.samefile(bundle):
        expected = "another folder: the bundle itself stays as it is"
        raise ArgumentError("--out", "the bundle that it is made of", got=str(out), expected=expected)
