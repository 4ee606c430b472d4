"""Hand-overs: where a generation stands between two steps, to be gone on with by another pipeline or elsewhere.

What goes over a wire or into a file is a message of one tensor, `state`, that says of which plan it is; see `messages`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from .arguments import whole_number
from .errors import RequestError
from .manifest import Manifest
from .messages import packed, unpacked
from .plan import Plan

Float32 = npt.NDArray[np.float32]
PROTOCOL = "tandemrt.handover/1"
# What stands for all text encoders together in `models_of`; no component may be called so.
TEXT = "text-encoders"
_KEYS = ("protocol", "plan", "bundle", "step", "seed", "models")
_MAX_MODELS, _DIGEST = 64, re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)  # of an array, which has no one truth
class Handover:
    """Where a generation stands.

    state: (1+H, B, C, h, w) float32, the latents and what the solver keeps of earlier predictions.
    step: how many inference steps have run. plan: `Plan.digest` of what they and the rest are steps of.
    bundle: the digest of the bundle that ran them, for the record: the rest may run on another one.
    seed: as `Request.seed`, the one drawn where none was given.
    models: `Manifest.model_digest` of each denoiser that ran them, by its name. Who has another one under the same name
        refuses the hand-over; who has none goes on.
    request: of a server's answer, the sha256 of the body that it answers; else empty.
    """

    state: Float32
    step: int
    plan: str
    bundle: str
    seed: int | tuple[int, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    request: str = ""

    def __repr__(self) -> str:
        return f"<Handover after step {self.step} of plan {self.plan[:12]}, state {self.state.shape}>"

    def to_bytes(self, dtype: Literal["float32", "float16"] = "float32") -> bytes:
        """The message. float16 halves it, and rounds the state to 11 bits.

        Raises:
            RequestError: the dtype is neither, or does not hold a value.
        """
        if dtype not in ("float32", "float16"):
            raise RequestError("dtype", "unknown", got=dtype, expected="float32 or float16")
        state: npt.NDArray[Any] | None = self.state if dtype == "float32" else in_half(self.state)
        if state is None or not np.isfinite(state).all():
            remedy = "Hand it over in float32."
            raise RequestError("handover", f"the state has values that {dtype} does not hold", remedy=remedy)
        facts = {"plan": self.plan, "bundle": self.bundle, "step": str(self.step)}
        listed = {"seed": json.dumps(self.seed), "models": json.dumps(dict(self.models))}
        answered = {"request": self.request} if self.request else {}
        return packed({"state": state}, {"protocol": PROTOCOL, **facts, **listed, **answered})

    @classmethod
    def from_bytes(cls, message: bytes) -> Handover:
        """The hand-over in a message; whether it suits a request is checked where that is made.

        Raises:
            RequestError: it is none, of another protocol, damaged, or holds NaN or Inf.
        """
        tensors, facts = unpacked("handover", message, {"state": 5}, {**dict.fromkeys(_KEYS, True), "request": False})
        if facts["protocol"] != PROTOCOL:
            remedy = "Use the same version of TandemRT on both sides."
            raise RequestError("handover", "protocol", got=facts["protocol"], expected=PROTOCOL, remedy=remedy)
        if "state" not in tensors:
            raise RequestError("handover", "has no state")
        step, seed, models = _step(facts["step"]), _seed(facts["seed"]), _models(facts["models"])
        return cls(tensors["state"], step, facts["plan"], facts["bundle"], seed, models, facts.get("request", ""))


def in_half(state: Float32) -> npt.NDArray[np.float16] | None:
    """A state in float16, half the bytes, rounded to 11 bits; None where that does not hold a value."""
    with np.errstate(over="ignore"):
        half = state.astype(np.float16)
    return half if np.isfinite(half).all() else None


def models_of(manifest: Manifest) -> dict[str, str]:
    """The digests that two sides of a hand-over compare: `model_digest` by denoiser, and one of all that reads texts.

    That, TEXT, is of the text encoders and tokenizers, and of how texts become what denoisers read: whatever they are
    called, there is one entry on either side.
    """
    encoders = manifest.text.encoders
    folders = tuple(f"{encoding.tokenizer}/" for encoding in encoders.values())
    tokenizers = sorted((path, one.sha256) for path, one in manifest.files.items() if path.startswith(folders))
    read = [[manifest.model_digest(name) for name in encoders], tokenizers, manifest.text]
    text = hashlib.sha256(msgspec.json.encode(read, order="deterministic")).hexdigest()
    return {**{name: manifest.model_digest(name) for name in manifest.names("denoiser")}, TEXT: text}


def handed_over(
    plan: Plan, step: int, state: Float32, bundle: str, seed: int | tuple[int, ...], models: Mapping[str, str]
) -> Handover:
    """The hand-over after so many steps of a plan; state: copied. seed: whole numbers of any kind."""
    plain = tuple(map(int, seed)) if isinstance(seed, tuple) else int(seed)
    return Handover(state.copy(), step, plan.digest, bundle, plain, models)


def require_models_of(start: Handover, models: Mapping[str, str]) -> None:
    """Raise RequestError where a hand-over's steps were run by another model than the one of the same name here.

    models: the digests of those that are here, by name.
    """
    for name, digest in start.models.items():
        if models.get(name, digest) != digest:
            remedy = "Use the same bundle on both sides, or one without this model on one of them."
            got, expected = digest[:16], f"{models[name][:16]}, the one of that name here"
            raise RequestError("start", f"its {name!r} is another model", got=got, expected=expected, remedy=remedy)


def require_seed_of(start: object, seed: int | Sequence[int] | None, pictures: int) -> None:
    """Raise RequestError where `start` is no hand-over, has seeds of other pictures, or is given another seed."""
    if not isinstance(start, Handover):
        expected = "a Handover: an Output's, or Handover.from_bytes(...)"
        raise RequestError("start", "of another type", got=type(start).__name__, expected=expected)
    if isinstance(start.seed, tuple) and len(start.seed) != pictures:
        raise RequestError("start", "how many seeds it has", got=len(start.seed), expected=f"1 or {pictures}")
    given = tuple(seed) if isinstance(seed, Sequence) else seed
    if given is not None and given != start.seed:
        raise RequestError("seed", "not the hand-over's", got=seed, expected=f"{start.seed}", remedy="Leave it out.")


def rows_between(plan: Plan, start: Handover | None, until: int | None) -> tuple[int, int]:
    """The rows from a hand-over to before inference step `until`: all of them where there is neither.

    Raises:
        RequestError: the hand-over is of another plan; a step out of range; or guidance or a placement goes by what it
            saw in the rows before, which a state does not hold.
    """
    steps = int(plan.table.steps[-1]) + 1
    first, last = 0 if start is None else start.step, steps
    if until is not None:
        number = whole_number(until)
        if number is None or not max(first, 1) <= number <= steps:
            expected = f"a whole number in {max(first, 1)}..{steps}, of the plan's steps"
            raise RequestError("until", "not usable", got=until, expected=expected)
        last = number
    if start is None and until is None:
        return 0, plan.table.rows
    if plan.adaptive is not None or plan.window is not None:
        what = "adaptive guidance" if plan.adaptive is not None else f"placement {plan.placement}"
        remedy = "Ask for fixed guidance and another placement."
        raise RequestError("until, start", f"{what} goes by what it saw in the rows before", remedy=remedy)
    if start is not None:
        _require_of_plan(start, plan, steps)
    return int(np.searchsorted(plan.table.steps, first)), int(np.searchsorted(plan.table.steps, last))


def _require_of_plan(start: Handover, plan: Plan, steps: int) -> None:
    if start.plan != plan.digest:
        remedy = "Ask for the same steps, solver, guidance and strength as where it was made, of a bundle of the same."
        raise RequestError("start", "of another plan", got=start.plan[:16], expected=plan.digest[:16], remedy=remedy)
    if not 0 <= start.step <= steps:
        raise RequestError("start", "step", got=start.step, expected=f"0..{steps}, of the plan's steps")


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise RequestError("handover", "step", got=text, expected="a whole number")
    return int(text)


def _seed(text: str) -> int | tuple[int, ...]:
    try:
        seed = json.loads(text)
    except (ValueError, RecursionError):
        seed = None
    listed = seed if isinstance(seed, list) else [seed]
    if not listed or any(whole_number(one) is None for one in listed):
        raise RequestError("handover", "seed", got=text, expected="a whole number, or several")
    return tuple(seed) if isinstance(seed, list) else int(listed[0])


def _models(text: str) -> dict[str, str]:
    try:
        models = json.loads(text)
    except (ValueError, RecursionError):
        models = None
    try:
        if isinstance(models, dict) and len(models) <= _MAX_MODELS:
            return {name: checked_digest(digest) for name, digest in models.items()}
    except ValueError:
        pass
    raise RequestError("handover", "models", got=text, expected="sha256 digests by denoiser")


def checked_digest(digest: object) -> str:
    """The digest, if it is a sha256; else ValueError."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("no sha256")
    return digest
