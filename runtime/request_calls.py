"""Requests as calls make them: of a request's own arguments, or of a mapping of these."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from .errors import RequestError, told_as
from .request import Request
from .request_checks import require_known

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def takes_request(
    make: Callable[P, Request],
) -> Callable[[Callable[[S, Request], R]], Callable[Concatenate[S, P], R]]:
    """Let a method of a request be called with the request's own arguments.

    Raises:
        RequestError: an argument is none of these, or cannot be used.
    """

    def decorate(method: Callable[[S, Request], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            require_known(kwargs, tuple(parameters))
            return method(self, make(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(make).parameters
        call.__signature__ = inspect.Signature([own, *parameters.values()])  # type: ignore[attr-defined]
        return call

    return decorate


def request_of(given: Request | Mapping[str, Any]) -> Request:
    """A request, given as one or as its arguments; raises RequestError as `takes_request`, and for what is neither."""
    if isinstance(given, Request):
        return given
    if not isinstance(given, Mapping):
        expected = 'a Request, or its arguments such as {"prompt": "a red circle", "seed": 7}'
        raise RequestError("request", "of another type", got=given, expected=expected)
    require_known(given, tuple(inspect.signature(Request).parameters))
    return Request(**given)


def numbered(requests: Iterable[Request | Mapping[str, Any]]) -> Iterator[tuple[int, Request]]:
    """Requests with their indices, each checked when it is taken; RequestError as of `request_of` names the index."""
    for index, given in enumerate(requests):
        with told_as(f"requests[{index}]"):
            request = request_of(given)
        yield index, request
