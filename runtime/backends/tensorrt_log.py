"""What TensorRT said of its errors, for ours."""

from __future__ import annotations

from typing import Any

from .buffers import one_line

_KEPT_MESSAGES, _SHOWN = 4, 1000


def error_log(trt: Any) -> Any:
    """A logger of the flavour that keeps its last errors; the class is made here, where its base is known."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages = [*self.messages, message][-_KEPT_MESSAGES:]

    return Log()


def last_said(log: Any) -> str:
    """The errors that such a logger has kept, in one line, told once: the next error is of another cause."""
    messages, log.messages = log.messages, []
    return "; ".join(one_line(message) for message in messages)[:_SHOWN] or "it did not say why"
