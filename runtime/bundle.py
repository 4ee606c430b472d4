"""Opening a bundle: every file is proved to be the one its manifest lists before any model parser reads it.

A digest proves integrity, not authorship: whoever can write the folder can write a new manifest too.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import manifest_files as manifests
from .arguments import did_you_mean
from .errors import ArgumentError, BundleError
from .files import is_part
from .manifest import Component, FileRecord, Manifest, TensorSpec
from .manifest_checks import TOKENIZER_FILE, check_manifest
from .manifest_files import MANIFEST_NAME, MAX_MANIFEST_BYTES, SEAL_NAME
from .onnx_files import external_files
from .tensors import check_loaded

LARGE_FILE_BYTES = 4 << 20
MAX_SEAL_BYTES = 1 << 10
HASHING_THREADS = 4

# O_NONBLOCK: a pipe put in a file's place must not hang the open. The flags are absent on Windows.
_READ_ONLY = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_COPY_AGAIN = "Copy the bundle again, or export it again."
_CHANGED = "It was changed after the bundle was opened: open the bundle again."


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle. `digest` is the sha256 of the manifest's bytes, and with it of everything in the bundle."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle's manifest and compare every file of the folder with it.

        The folder itself may be reached through a symbolic link; inside, there are regular files only, exactly the
        ones listed, each with one name (a second hard link would let a change from outside follow the check). What hubs
        and file managers leave beside them (`.git`, `.cache`, `README.md` …) is passed over unread.

        Raises:
            BundleError: not a bundle, damaged, of a newer format, with files too many or too few, or reaching outside.
        """
        path = Path(path)
        _require_bundle(path)
        raw = _start_of(path / MANIFEST_NAME, MAX_MANIFEST_BYTES + 1)
        where = _shown(path / MANIFEST_NAME)
        sealed = os.path.lexists(path / SEAL_NAME)
        # Before it is read: a flipped bit in the format's number would send the caller to another version.
        if sealed and len(raw) <= MAX_MANIFEST_BYTES:
            raw = _sealed(path, raw)
        manifest = manifests.decode(raw, where)
        if not sealed:
            raise BundleError(_shown(path / SEAL_NAME), "is missing", remedy=_COPY_AGAIN)
        check_manifest(manifest, where)
        _check_folder(path, manifest.files)
        _check_digests(path, manifest.files)
        for component in manifest.components.values():
            _check_external_files(path, component, manifest.files)
        if _start_of(path / SEAL_NAME, MAX_SEAL_BYTES) != manifests.seal(raw):
            manifests.settle_seal(path)
        return cls(path, manifest, hashlib.sha256(raw).hexdigest())

    def component(self, name: str) -> Component:
        """The component called `name`.

        Raises:
            BundleError: the bundle has none of that name.
        """
        if name not in self.manifest.components:
            expected = f"one of {', '.join(self.manifest.components)}"
            remedy = did_you_mean(name, self.manifest.components)
            raise BundleError(_shown(self.path), "no such component", got=name, expected=expected, remedy=remedy)
        return self.manifest.components[name]

    def require_components(self, option: str, names: Iterable[str]) -> None:
        """Raise ArgumentError when an option names a component that the bundle has not."""
        try:
            for name in names:
                self.component(name)
        except BundleError as error:
            raise ArgumentError(option, error.what, got=name, expected=error.expected, remedy=error.remedy) from error

    def model_path(self, name: str) -> Path:
        """Where the ONNX model of component `name` lies; raises BundleError as `component` does."""
        return self.path / self.component(name).model

    def check_component(self, name: str) -> None:
        """Compare the files that component `name` is loaded from with the manifest once more.

        They may have been replaced since the bundle was opened. A text encoder's files are its tokenizer's too.

        Raises:
            BundleError: a file is missing, is no regular file of one name, or has another size or content.
        """
        component, files = self.component(name), self.manifest.files
        _check_files(self.path, {component.model: files[component.model]})
        _check_external_files(self.path, component, files)
        folder = posixpath.dirname(component.model)
        others = {
            posixpath.normpath(posixpath.join(folder, path)) for path in external_files(self.path / component.model)
        }
        if name in self.manifest.text.encoders:
            tokenizer = f"{self.manifest.text.encoders[name].tokenizer}/"
            others.update(path for path in files if path.startswith(tokenizer))
        _check_files(self.path, {other: files[other] for other in sorted(others)})

    def check_tensors(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raise BundleError unless the model loaded for component `name` has the tensors its manifest lists."""
        component = self.component(name)
        where = _shown(self.path / component.model)
        check_loaded(where, inputs, component.inputs)
        check_loaded(where, outputs, component.outputs)

    def tokenizer_path(self, encoder: str) -> Path:
        """Where the tokenizer of a text encoder lies, one of the manifest's `text.encoders`."""
        return self.path / self.manifest.text.encoders[encoder].tokenizer / TOKENIZER_FILE


def _require_bundle(folder: Path) -> None:
    remedy = "Make a bundle with `tandemrt export CHECKPOINT OUT`, or check the path."
    try:
        if not folder.is_dir():
            raise BundleError(_shown(folder), "not a bundle folder", remedy=remedy)
        if not os.path.lexists(folder / MANIFEST_NAME):
            raise BundleError(_shown(folder), f"not a bundle: it holds no {MANIFEST_NAME}", remedy=remedy)
    except (OSError, ValueError) as error:
        raise _unreadable(folder / MANIFEST_NAME, error) from error


def _start_of(path: Path, size: int) -> bytes:
    """A file's first `size` bytes, once it is known for a regular file of one name."""
    try:
        _check_entry(path, path.lstat())
        with _opened(path) as stream:
            return stream.read(size)
    except OSError as error:
        raise _unreadable(path, error) from error


def _sealed(folder: Path, raw: bytes) -> bytes:
    """The manifest, compared with its seal: one flipped bit in a number would give another valid manifest.

    It is the one that is there by now where another process has replaced both since `raw` was read.
    """
    if manifests.is_sealed(raw, _start_of(folder / SEAL_NAME, MAX_SEAL_BYTES)):
        return raw
    now = _start_of(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES + 1)
    if now != raw and manifests.is_sealed(now, _start_of(folder / SEAL_NAME, MAX_SEAL_BYTES)):
        return now
    raise BundleError(
        _shown(folder / MANIFEST_NAME),
        "sha256",
        got=hashlib.sha256(raw).hexdigest(),
        expected=f"the one in {SEAL_NAME}",
        remedy=_COPY_AGAIN,
    )


# What model hubs, version control and file managers put beside a bundle's own files; never read. Nor is what was begun
# when a manifest was replaced and the process killed.
_STRANGERS = frozenset({".cache", ".git", ".gitattributes", ".gitignore", ".DS_Store", "README.md", "LICENSE"})


def _check_folder(root: Path, files: dict[str, FileRecord]) -> None:
    """What lies in the folder is what is listed, of the listed sizes; nothing is opened yet."""
    found = set()
    try:
        for name, entry in _entries(root, "", _folders(files)):
            if name in (MANIFEST_NAME, SEAL_NAME):
                continue
            path = root / name
            if name not in files:
                raise BundleError(
                    _shown(path), "a file the manifest does not list", remedy="Remove it, or export the bundle again."
                )
            status = entry.stat(follow_symlinks=False)
            _check_entry(path, status)
            if status.st_size != files[name].size:
                raise BundleError(
                    _shown(path), "size", got=status.st_size, expected=f"{files[name].size} bytes", remedy=_COPY_AGAIN
                )
            found.add(name)
    except OSError as error:
        raise _unreadable(root, error) from error
    for name in files:
        if name not in found:
            raise BundleError(_shown(root / name), "a listed file is missing", remedy=_COPY_AGAIN)


def _folders(files: Iterable[str]) -> frozenset[str]:
    return frozenset(
        "/".join(segments[:depth])
        for segments in (name.split("/") for name in files)
        for depth in range(1, len(segments))
    )


def _entries(root: Path, folder: str, folders: frozenset[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything under `root` that is not a folder nor a stranger; other folders than the files' are refused unseen."""
    with os.scandir(root / folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if name in _STRANGERS or is_part(name):
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield name, entry
            elif name in folders:
                yield from _entries(root, name, folders)
            else:
                raise BundleError(
                    _shown(root / name), "a folder the manifest does not list", remedy="Remove it, or export again."
                )


def _check_entry(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        remedy = "Copy the bundle with `cp -rL`, or download it with real files (`--local-dir`)."
        raise BundleError(_shown(path), "a symbolic link", expected="a regular file", remedy=remedy)
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(_shown(path), "a special file", expected="a regular file", remedy=_COPY_AGAIN)
    if status.st_nlink > 1:
        raise BundleError(
            _shown(path),
            "hard links to this file",
            got=status.st_nlink,
            expected="1, since a name outside the bundle could change it after the check",
            remedy="Copy the bundle with `cp -r`.",
        )


def _check_digests(root: Path, files: dict[str, FileRecord], remedy: str = _COPY_AGAIN) -> None:
    names = sorted(files, key=lambda name: -files[name].size)
    paths = [root / name for name in names]
    if sum(record.size >= LARGE_FILE_BYTES for record in files.values()) > 1:
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 (small bundles open without it)

        # hashlib lets go of the interpreter's lock, so large files are hashed side by side.
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            digests = dict(zip(names, pool.map(_sha256, paths), strict=True))
    else:
        digests = dict(zip(names, map(_sha256, paths), strict=True))
    for name, record in files.items():
        if digests[name] != record.sha256:
            raise BundleError(_shown(root / name), "sha256", got=digests[name], expected=record.sha256, remedy=remedy)


def _check_files(root: Path, files: dict[str, FileRecord]) -> None:
    """These files, without looking at what else lies in the folder."""
    for name, record in files.items():
        path = root / name
        try:
            for folder in path.relative_to(root).parents[:-1]:
                if not stat.S_ISDIR((root / folder).lstat().st_mode):
                    raise BundleError(_shown(root / folder), "not a folder", remedy=_COPY_AGAIN)
            status = path.lstat()
        except OSError as error:
            raise _unreadable(path, error) from error
        _check_entry(path, status)
        if status.st_size != record.size:
            raise BundleError(
                _shown(path), "size", got=status.st_size, expected=f"{record.size} bytes", remedy=_CHANGED
            )
    _check_digests(root, files, _CHANGED)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with _opened(path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _check_external_files(root: Path, component: Component, files: dict[str, FileRecord]) -> None:
    """Weights that a model keeps in other files must be files of this bundle, and so checked like the rest."""
    folder = posixpath.dirname(component.model)
    for location in sorted(external_files(root / component.model)):
        if posixpath.normpath(posixpath.join(folder, location)) not in files:
            raise BundleError(
                _shown(root / component.model),
                "weights in a file that is not part of the bundle",
                got=location[:256],
                expected="a file that the manifest lists",
                remedy="Do not use this bundle unless you trust its origin.",
            )


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, _READ_ONLY), "rb")


def _shown(path: Path) -> str:
    """A path as text that can be printed, whatever bytes its name holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _unreadable(path: Path, error: Exception) -> BundleError:
    where = _shown(Path(getattr(error, "filename", None) or path))
    return BundleError(where, f"cannot be read ({getattr(error, 'strerror', None) or error})", remedy="Check the path.")
