"""Reading and writing the bundle manifest, `tandem.json`, and `tandem.sha256` beside it, its seal."""

from __future__ import annotations

import hashlib
import operator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from .errors import BundleError
from .files import file_sha256, locked, sync_folder, write_whole
from .manifest import FORMAT, Component, FileRecord, Manifest

MANIFEST_NAME = "tandem.json"
SEAL_NAME = "tandem.sha256"
MAX_MANIFEST_BYTES = 4 << 20


class _FormatOnly(msgspec.Struct):
    format: int


class _ComponentsOnly(msgspec.Struct):
    components: dict[str, Any]


def decode(raw: bytes, where: str) -> Manifest:
    """Parse a manifest's bytes; `where` names it in errors.

    Raises:
        BundleError: larger than 4 MiB, not JSON, of a newer format, or with missing, unknown or mistyped fields.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(where, "manifest size", got=len(raw), expected=f"at most {MAX_MANIFEST_BYTES} bytes")
    try:
        stated = msgspec.json.decode(raw, type=_FormatOnly).format
        if stated != FORMAT:
            remedy = "Upgrade tandemrt, or export the bundle again." if stated > FORMAT else "Export the bundle again."
            raise BundleError(where, "bundle format", got=stated, expected=str(FORMAT), remedy=remedy)
        return _decode_this_format(raw, where)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(where, f"not a bundle manifest ({error})", remedy="Export the bundle again.") from error


def _decode_this_format(raw: bytes, where: str) -> Manifest:
    try:
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.ValidationError as error:
        remedy = "It may come from a newer tandemrt: upgrade, or export the bundle again."
        what = f"says what this version does not know ({_with_component_name(str(error), raw)})"
        raise BundleError(where, what, remedy=remedy) from error


def _with_component_name(message: str, raw: bytes) -> str:
    """msgspec's message with the name of the first component it means, which it does not tell."""
    if "$.components[...]" in message:
        for name, entry in msgspec.json.decode(raw, type=_ComponentsOnly).components.items():
            try:
                msgspec.convert(entry, Component)
            except msgspec.ValidationError:  # noqa: PERF203 (which of them it is, is the question)
                return message.replace("components[...]", f"components[{name[:64]!a}]")
    return message


def encode(manifest: Manifest) -> bytes:
    """The manifest as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def seal(raw: bytes) -> bytes:
    """What `tandem.sha256` must hold for a manifest's bytes: the line that `sha256sum tandem.json` prints."""
    return f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST_NAME}\n".encode()


def is_sealed(raw: bytes, found: bytes) -> bool:
    """Whether the bytes of a seal are of a manifest's bytes: of these alone or, while one replaces another, of both."""
    own, lines = seal(raw), found.splitlines(keepends=True)
    return found == own or (len(found) == 2 * len(own) and own in lines and len(lines) == len(set(lines)) == 2)


def write(manifest: Manifest, folder: Path) -> None:
    """Write a manifest and its seal.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    raw = encode(manifest)
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / SEAL_NAME).write_bytes(seal(raw))


def rewrite(manifest: Manifest, folder: Path) -> None:
    """Replace a bundle's manifest; whatever happens, the bundle then has the old one or the new one, sealed.

    The seal names both while the manifest is replaced.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    old, new = (folder / MANIFEST_NAME).read_bytes(), encode(manifest)
    both = b"".join(dict.fromkeys((seal(old), seal(new))))
    steps = ((SEAL_NAME, both), (MANIFEST_NAME, new), (SEAL_NAME, seal(new)))
    for name, content in steps:
        write_whole(folder / name, operator.methodcaller("write", content))
        sync_folder(folder)


def settle_seal(folder: Path) -> None:
    """Have the seal name the manifest alone, where a process was killed while it replaced that.

    A process that is at it is left alone. What cannot be written stays: the bundle opens all the same.
    """
    with suppress(OSError), locked(folder, wait=False) as held:
        raw, found = (folder / MANIFEST_NAME).read_bytes(), (folder / SEAL_NAME).read_bytes()
        if held and found != seal(raw) and is_sealed(raw, found):
            write_whole(folder / SEAL_NAME, operator.methodcaller("write", seal(raw)))
            sync_folder(folder)


def file_records(folder: Path) -> dict[str, FileRecord]:
    """The records of every file in a bundle's folder but the manifest and its seal, by their paths in it."""
    own = (folder / MANIFEST_NAME, folder / SEAL_NAME)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    return {
        path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=file_sha256(path))
        for path in paths
    }
