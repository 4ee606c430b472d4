"""Why a server did not help, in one word: what its answers mean, which are tried again, what others are told."""

from __future__ import annotations

import json

from .connections import Answer
from .errors import CloudError

# Who answers so is there, and is no worse for it.
ANSWERED = frozenset({"unauthorized", "conflict", "refused", "untrusted", "busy", "unready"})
_TRIED_AGAIN = frozenset({408, 429, 502, 503, 504})
_REASONS = {401: "unauthorized", 408: "deadline", 409: "conflict", 429: "busy", 503: "unready", 504: "deadline"}
# What is told to others than the device: neither the server's address nor what it, or who stands before it, answered.
_MEANINGS = {
    "unreachable": "it could not be reached, or broke off",
    "deadline": "it did not answer in time",
    "broken": "it failed several times in a row, and is left alone for a while",
    "busy": "as many wait there as may",
    "unready": "it is not ready",
    "unauthorized": "it does not take the token",
    "untrusted": "its certificate is not trusted",
    "conflict": "it has another model, bundle or plan",
    "malformed": "its answer could not be used",
    "refused": "it refused the request",
    "failed": "it failed",
}


def reason_alone(degraded: str) -> str:
    """Why a server did not help, as `Output.degraded` begins, for others than those who asked it; empty where it did.

    It has no address, and nothing of what was answered.
    """
    reason = degraded.partition(":")[0]
    return f"{reason}: {_MEANINGS[reason]}" if degraded else ""


def refused(url: str, answer: Answer) -> CloudError:
    """What an answer other than 200 means."""
    try:
        said = str(json.loads(answer.body)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = answer.reason
    after = answer.headers.get("Retry-After", "")
    pause = float(after) if after.isascii() and after.isdigit() and len(after) < 6 else 0.0
    reason = _REASONS.get(answer.status, "refused" if answer.status < 500 else "failed")
    what = f"answered {answer.status}: {said}".rstrip(":. ")  # a full stop follows
    return CloudError(url, reason, what, retryable=answer.status in _TRIED_AGAIN, pause=pause)
