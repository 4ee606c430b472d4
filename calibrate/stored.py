"""What was measured becomes part of a bundle: its manifest and its seal are replaced, its models stay as they are."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable

from ..runtime.bundle import Bundle
from ..runtime.errors import BundleError
from ..runtime.files import NO_LOCKS, locked, sweep_parts
from ..runtime.manifest import Manifest
from ..runtime.manifest_checks import check_manifest
from ..runtime.manifest_files import MANIFEST_NAME, MAX_MANIFEST_BYTES, decode, encode, rewrite


def require_storable(bundle: Bundle) -> None:
    """Find out before anything is measured that nothing could be stored.

    Raises:
        BundleError: the bundle's folder cannot be locked or written.
    """
    where = str(bundle.path / MANIFEST_NAME)
    try:
        with locked(bundle.path, wait=False):
            pass
        if not os.access(bundle.path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _refused(where, error) from error


def store(bundle: Bundle, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Replace a bundle's manifest with what `change` makes of the one that is there; one process at a time does.

    Another calibration may have stored defaults of its own since the bundle was opened: these stay. The digest of the
    bundle is another one then; its engines, which are found by the graphs' content, and whatever else goes by
    `Manifest.files_digest` hold for it as before.

    Raises:
        BundleError: the bundle's files are others than when it was opened, the manifest made cannot be used, or it
            cannot be written or locked; the one that was there stays.
    """
    where = str(bundle.path / MANIFEST_NAME)
    try:
        with locked(bundle.path):
            sweep_parts(bundle.path)
            raw = (bundle.path / MANIFEST_NAME).read_bytes()
            current = decode(raw, where)
            if current.files_digest != bundle.manifest.files_digest:
                remedy = "Calibrate the bundle that is there now."
                raise BundleError(where, "lists other files than when it was opened", remedy=remedy)
            changed = change(current)
            raw = encode(changed)
            if len(raw) > MAX_MANIFEST_BYTES:
                raise BundleError(where, "size", got=len(raw), expected=f"at most {MAX_MANIFEST_BYTES} bytes")
            check_manifest(decode(raw, where), where)
            rewrite(changed, bundle.path)
    except OSError as error:
        raise _refused(where, error) from error
    return Bundle(bundle.path, changed, hashlib.sha256(raw).hexdigest())


def _refused(where: str, error: OSError) -> BundleError:
    """The error for a manifest that the system does not let be replaced."""
    if error.errno in NO_LOCKS:
        what = f"its folder cannot be locked against other processes ({error.strerror})"
        remedy = "Calibrate a copy of the bundle on a file system that knows locks."
        return BundleError(where, what, remedy=remedy)
    remedy = "Free space, or give a bundle in a folder that can be written."
    return BundleError(where, f"cannot be written ({error.strerror or error})", remedy=remedy)
