"""The errors of TandemRT, one tree.

TandemError                  anything we raise on purpose; `exit_status` 1
├── ArgumentError            an argument that cannot be used; `exit_status` 2
│   ├── RequestError         of a generation: prompt, size, guidance, seed
│   │   └── MessageError     bytes that are no message of ours, or a damaged one
│   └── PlanError            of a schedule: solver, steps, scheduler configuration
├── CheckpointError          a source that is no checkpoint, or not one of a supported kind
├── ExportError              a bundle that cannot be made: a failed export, a missed threshold, a taken place
├── BundleError              a bundle that is damaged, foreign or newer than this runtime
├── TargetError              a backend, device or precision that is not available here
├── EngineError              an engine that cannot be built, or does not fit what it is asked for
│   ├── UntrustedError       a folder of the cache of engines that others could have written to
│   └── CacheError           the cache of engines cannot be written, whichever engine is built
│       └── CacheFullError   the cache of engines has no room for one
├── BenchmarkError           a benchmark that cannot be run, or a file that is no report of one
├── CalibrationError         what was measured cannot be used, or leads to nothing of what was asked for
├── CloudError               a server of hand-overs that did not help in time
└── ExecutionError           a model that failed while running
    ├── NonFiniteError       a model that returned NaN or Inf, or what leads to them
    └── CancelledError       a generation stopped by its caller
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .cloud import CloudTiming

BUILD = "`tandemrt build-engine`"  # in remedies: where the bundle is known, `exact_remedy` has the whole command
_ABSENT = object()
_SHOWN_CHARACTERS = 1000


class TandemError(Exception):
    """Base class. The message reads `where: what, got value, expected range. Remedy.`"""

    exit_status: ClassVar[int] = 1

    def __init__(
        self, where: str, what: str, *, got: object = _ABSENT, expected: str | None = None, remedy: str = ""
    ) -> None:
        self.where, self.what, self.expected, self.remedy = where, what, expected, remedy
        message = f"{where}: {what}"
        if got is not _ABSENT:
            message += f", got {_shown(got)}"
        if expected is not None:
            message += f", expected {expected}"
        super().__init__(f"{message}. {remedy}".rstrip())

    @property
    def without_remedy(self) -> str:
        """The message as part of a sentence."""
        return str(self).removesuffix(self.remedy).rstrip(". ")

    def again(self) -> TandemError:
        """The same error, without its traceback, which holds on to all that it went through."""
        return copy.copy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and sent to other processes whole: what it was made of is more than the message that it keeps."""
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[TandemError], args: tuple[object, ...]) -> TandemError:
    return kind.__new__(kind, *args)


@contextmanager
def told_as(place: str) -> Iterator[None]:
    """Errors that arise within name the place that they arose in, before their own: `requests[1]: size: …`."""
    try:
        yield
    except TandemError as error:
        named = error.again()
        named.where, named.args = f"{place}: {error.where}", (f"{place}: {error}",)
        raise named from None


def _shown(got: object) -> str:
    """`got` in one line of bounded length, whatever a caller passed."""
    try:
        text = repr(got)
    except Exception:  # Python refuses to print whole numbers of thousands of digits; other objects raise at will
        return f"a {type(got).__name__} that cannot be shown"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


class ArgumentError(TandemError):
    """An argument that cannot be used."""

    exit_status = 2


class RequestError(ArgumentError):
    """A generation's prompt, size, guidance scale, seed, latents or embeddings cannot be used."""


class MessageError(RequestError):
    """Bytes that are no message of ours, or a damaged one."""


class PlanError(ArgumentError):
    """A schedule cannot be compiled: solver, step counts or scheduler configuration."""


class CheckpointError(TandemError):
    """A source is no checkpoint, or not one of a supported kind."""


class ExportError(TandemError):
    """What is exported cannot be made: it failed, missed a threshold, or its place is taken; nothing was published."""


class BundleError(TandemError):
    """A bundle is damaged, foreign, or newer than this runtime."""


class TargetError(TandemError):
    """A backend, device or precision is not available here."""


class EngineError(TandemError):
    """An engine cannot be built, or none that is there fits the bundle, the machine or the request."""


class UntrustedError(EngineError):
    """A folder of the cache of engines is not the user's own alone: its mode or owner helps, and no build does."""


class CacheError(EngineError):
    """The cache of engines cannot be written: no other build would end better."""


class CacheFullError(CacheError):
    """The file system of the cache has no room for an engine; a smaller one may fit."""


class BenchmarkError(TandemError):
    """A benchmark cannot be run, or a file is no report of one."""


class CalibrationError(TandemError):
    """What was measured is damaged, unfinished or of another bundle, or leads to nothing of what was asked for."""


class CloudError(TandemError):
    """A server of hand-overs did not help in time.

    reason: in one word, for those who count. retryable: whether another try may end better, after `pause` seconds.
    timing: what a hand-over took that was not made.
    """

    timing: CloudTiming | None = None

    def __init__(self, url: str, reason: str, what: str, *, retryable: bool = False, pause: float = 0.0) -> None:
        super().__init__(url, what)
        self.reason, self.retryable, self.pause = reason, retryable, pause


class ExecutionError(TandemError):
    """A model failed while running, or returned NaN or Inf."""


class NonFiniteError(ExecutionError):
    """A model returned NaN or Inf, or what leads to them."""


class CancelledError(ExecutionError):
    """A generation was stopped by its caller."""
