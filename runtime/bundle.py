"""Opening a bundle: every file is proved to be the one its manifest lists before any model parser reads it.

A digest proves integrity, not authorship: whoever can write the folder can write a new manifest too.
"""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import manifest as manifests
from .errors import BundleError
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SEAL_NAME, Component, FileRecord, Manifest, TensorSpec
from .onnx_files import external_files
from .tensors import check_loaded, check_role

TOKENIZER = "tokenizer/tokenizer.json"
MAX_PATH_CHARACTERS = 255
MAX_EXTENT = 1 << 16
LARGE_FILE_BYTES = 4 << 20
HASHING_THREADS = 4

_SEGMENT = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
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
        ones listed, each with one name (a second hard link would let a change from outside follow the check).

        Raises:
            BundleError: not a bundle, damaged, of a newer format, with files too many or too few, or reaching outside.
        """
        path = Path(path)
        _require_bundle(path)
        raw = _start_of(path / MANIFEST_NAME, MAX_MANIFEST_BYTES + 1)
        where = _shown(path / MANIFEST_NAME)
        manifest = manifests.decode(raw, where)
        _check_seal(path, raw)
        _check_listing(manifest.files, where)
        _check_components(manifest, where)
        _check_facts(manifest, where)
        _check_folder(path, manifest.files)
        _check_digests(path, manifest.files)
        for component in manifest.components.values():
            _check_external_files(path, component, manifest.files)
        return cls(path, manifest, hashlib.sha256(raw).hexdigest())

    def component(self, name: str) -> Component:
        """The component called `name`.

        Raises:
            BundleError: the bundle has none of that name.
        """
        if name not in self.manifest.components:
            known = ", ".join(self.manifest.components)
            raise BundleError(_shown(self.path), "no such component", got=name, expected=f"one of {known}")
        return self.manifest.components[name]

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
        if component.role == "text_encoder":
            others.add(TOKENIZER)
        _check_files(self.path, {other: files[other] for other in sorted(others)})

    def check_tensors(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raise BundleError unless the model loaded for component `name` has the tensors its manifest lists."""
        component = self.component(name)
        where = _shown(self.path / component.model)
        check_loaded(where, inputs, component.inputs)
        check_loaded(where, outputs, component.outputs)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER


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


def _check_seal(folder: Path, raw: bytes) -> None:
    """Compare the manifest with its seal: one flipped bit in a number would give another valid manifest."""
    if not os.path.lexists(folder / SEAL_NAME):
        raise BundleError(_shown(folder / SEAL_NAME), "is missing", remedy=_COPY_AGAIN)
    expected = manifests.seal(raw)
    sealed = _start_of(folder / SEAL_NAME, len(expected) + 1)
    if sealed != expected:
        raise BundleError(
            _shown(folder / MANIFEST_NAME),
            "sha256",
            got=hashlib.sha256(raw).hexdigest(),
            expected=f"the one in {SEAL_NAME}",
            remedy=_COPY_AGAIN,
        )


def _check_listing(files: dict[str, FileRecord], where: str) -> None:
    """Paths that mean the same file everywhere, also where case does not count; plausible sizes and digests."""
    spelled: dict[str, str] = {}
    for name, record in files.items():
        segments = name.split("/")
        if len(name) > MAX_PATH_CHARACTERS or not all(_SEGMENT.fullmatch(segment) for segment in segments):
            raise BundleError(
                where,
                "path of a file",
                got=name[: MAX_PATH_CHARACTERS + 1],
                expected=f"at most {MAX_PATH_CHARACTERS} of A-Z a-z 0-9 _ . - and /, inside the bundle",
                remedy="Do not use this bundle unless you trust its origin.",
            )
        for depth in range(1, len(segments) + 1):
            prefix = "/".join(segments[:depth])
            if spelled.setdefault(prefix.lower(), prefix) != prefix:
                raise BundleError(
                    where, "two paths that differ in case only", got=name, expected=f"only {spelled[prefix.lower()]!r}"
                )
            if depth < len(segments) and prefix in files:
                raise BundleError(where, "a path that is both file and folder", got=prefix)
        if name.lower() in (MANIFEST_NAME, SEAL_NAME):
            raise BundleError(where, "a manifest that lists itself", got=name)
        if record.size < 0:
            raise BundleError(where, f"size of {name!r}", got=record.size, expected="0 or more bytes")
        if not _SHA256.fullmatch(record.sha256):
            raise BundleError(where, f"sha256 of {name!r}", got=record.sha256[:80], expected="64 hexadecimal digits")


def _check_components(manifest: Manifest, where: str) -> None:
    for name, component in manifest.components.items():
        if not _NAME.fullmatch(name):
            raise BundleError(where, "component name", got=name[:80], expected="lower-case letters, digits and _")
        if component.model not in manifest.files or not component.model.endswith(".onnx"):
            expected = "an .onnx file that the manifest lists"
            raise BundleError(where, f"model of component {name!r}", got=component.model[:256], expected=expected)
        if component.role == "denoiser" and component.prediction_type is None:
            raise BundleError(where, f"denoiser {name!r} without a prediction type", remedy="Export the bundle again.")
        check_role(where, name, component)
    for role in ("text_encoder", "denoiser", "vae_decoder"):
        if not any(component.role == role for component in manifest.components.values()):
            raise BundleError(where, f"no component with role {role!r}", remedy="Export the bundle again.")
    if TOKENIZER not in manifest.files:
        raise BundleError(where, f"no {TOKENIZER} among the files", remedy="Export the bundle again.")


def _check_facts(manifest: Manifest, where: str) -> None:
    """Numbers a generation divides by or allocates with."""
    latent, text, defaults = manifest.latent, manifest.text, manifest.defaults
    extents = {
        "latent.channels": latent.channels,
        "latent.downsampling": latent.downsampling,
        "text.max_length": text.max_length,
        "text.width": text.width,
        "defaults.height": defaults.height,
        "defaults.width": defaults.width,
        "defaults.num_inference_steps": defaults.num_inference_steps,
        **{f"components.{name}.spatial_multiple": part.spatial_multiple for name, part in manifest.components.items()},
    }
    for name, extent in extents.items():
        if not 1 <= extent <= MAX_EXTENT:
            raise BundleError(where, name, got=extent, expected=f"1 to {MAX_EXTENT}")
    if not math.isfinite(latent.scaling_factor) or latent.scaling_factor == 0:
        raise BundleError(where, "latent.scaling_factor", got=latent.scaling_factor, expected="a number other than 0")
    for name, value in (
        ("latent.shift_factor", latent.shift_factor),
        ("defaults.guidance_scale", defaults.guidance_scale),
    ):
        if not math.isfinite(value):
            raise BundleError(where, name, got=value, expected="a finite number")


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
    """Everything under `root` that is not a folder; a folder that holds no listed file is refused unseen."""
    with os.scandir(root / folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{folder}/{entry.name}" if folder else entry.name
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
