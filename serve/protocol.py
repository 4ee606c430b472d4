"""What clients ask for: JSON that is checked against a schema, alone or as the text of a message with tensors.

A message has the tensors that JSON has no good form for: a `state` to go on from, and text that was encoded where the
prompt is; see `tandemrt.runtime.messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tandemrt.runtime import Handover, Request
from tandemrt.runtime.cloud import MESSAGE, PROTOCOL
from tandemrt.runtime.errors import MessageError
from tandemrt.runtime.messages import unpacked
from tandemrt.runtime.request import TEXTS

from .limits import Limits
from .problems import conflict, malformed, unusable

TENSORS = {
    "state": 5,
    "prompt_embeds": 3,
    "negative_prompt_embeds": 3,
    "pooled_prompt_embeds": 2,
    "negative_pooled_prompt_embeds": 2,
}
Text = str | list[str]


class Asked(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What is painted; names and meanings are those of `tandemrt.runtime.Request`.

    until: see there; a hand-over is what it stops for. start_step, plan, seed: of the `state` in a message.
    dtype: of the state that is answered, if it holds it. timeout: in seconds, of all of it.
    bundle: the digest of the bundle that is to be used, where the client cares; models: `models_of` it, of some.
    """

    prompt: Text | None = None
    prompt_2: Text | None = None
    prompt_3: Text | None = None
    negative_prompt: Text | None = None
    negative_prompt_2: Text | None = None
    negative_prompt_3: Text | None = None
    steps: int | dict[str, int] | list[tuple[str, int]] | None = None
    solver: str | None = None
    solver_config: dict[str, bool | int | float | str | None] | None = None
    timesteps: list[int] | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    seed: int | list[int] | None = None
    seed_device: Literal["cpu", "cuda"] = "cpu"
    strict_prompts: bool = False
    until: int | None = None
    start_step: int | None = None
    plan: str | None = None
    bundle: str | None = None
    models: dict[str, str] | None = None
    model: str | None = None
    dtype: Literal["float32", "float16"] = "float32"
    timeout: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a `Request`."""
        own = {"start_step", "plan", "bundle", "models", "model", "dtype", "timeout"}
        return {name: value for name in self.__struct_fields__ if name not in own
                and (value := getattr(self, name)) is not None}  # fmt: skip


def asked_of(body: bytes, media_type: str) -> tuple[Asked, dict[str, Any]]:
    """What a body asks for, and its tensors.

    Raises:
        Problem: malformed, or a value of another type than it has to be.
        RequestError: a tensor cannot be used.
    """
    tensors: Mapping[str, Any] = {}
    text: bytes | str = body
    if media_type == MESSAGE:
        try:
            tensors, facts = unpacked("body", body, TENSORS, {"protocol": True, "request": True})
        except MessageError as error:
            raise malformed(str(error)) from error
        if facts["protocol"] != PROTOCOL:
            raise malformed(f"protocol: got {facts['protocol'][:100]!r}, expected {PROTOCOL!r}.")
        text = facts["request"]
    try:
        return msgspec.json.decode(text, type=Asked), dict(tensors)
    except msgspec.ValidationError as error:
        raise unusable(f"request: {error}.") from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise malformed(f"request: no JSON ({error}).") from error


def request_of(asked: Asked, tensors: dict[str, Any], digest: str, limits: Limits) -> Request:
    """The pipeline's request, within the limits.

    digest: of the server's bundle.

    Raises:
        Problem: another bundle is wanted, or a limit is passed.
        RequestError: an argument cannot be used.
    """
    if asked.bundle is not None and asked.bundle != digest:
        raise conflict(f"bundle: got {asked.bundle[:16]!r}, expected {digest[:16]!r}, which is served.")
    if (steps := _steps(asked)) > limits.steps:  # before a plan of them is compiled
        raise unusable(f"steps: got {steps}, expected at most {limits.steps}.")
    given = asked.arguments
    size = sum(len(text.encode("utf-8", "replace")) for name in TEXTS for text in _texts(given.get(name)))
    if size > limits.prompt_bytes:
        raise unusable(f"prompt: got {size} bytes, expected at most {limits.prompt_bytes} of all texts together.")
    state = tensors.pop("state", None)
    if state is not None:
        if asked.start_step is None or asked.plan is None or asked.seed is None:
            raise unusable("state: given without start_step, plan and seed, which say what it is of.")
        seed = given.pop("seed")
        given["start"] = Handover(
            state, asked.start_step, asked.plan, digest, seed if isinstance(seed, int) else tuple(seed)
        )
    request = Request(**given, **tensors)
    if request.pictures > limits.pictures:
        raise unusable(f"pictures: got {request.pictures}, expected at most {limits.pictures}.")
    return request


def require_within(steps: int, shape: tuple[int, ...], downsampling: int, limits: Limits) -> None:
    """Raise Problem where a plan has too many rows, or pictures too many pixels, for a server."""
    if steps > limits.steps:
        raise unusable(f"steps: got {steps}, expected at most {limits.steps}.")
    pixels = shape[2] * shape[3] * downsampling**2
    if pixels > limits.pixels:
        raise unusable(f"height, width: got {pixels} pixels, expected at most {limits.pixels}.")


def _steps(asked: Asked) -> int:
    """How many steps are asked for, in whichever way; what is wrong with them is for the plan to say."""
    if asked.steps is None or isinstance(asked.steps, int):
        counts = [asked.steps or 0]
    else:
        counts = list(asked.steps.values() if isinstance(asked.steps, dict) else [count for _, count in asked.steps])
    return max(sum(count for count in counts if count > 0), len(asked.timesteps or ()))


def _texts(value: Text | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
