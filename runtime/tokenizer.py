"""Prompts to token ids as CLIP's and T5's tokenizers make them, and the text that did not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import BundleError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PROMPT_BYTES = 64 << 10
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class DroppedText:
    """The end of a prompt that was longer than a text encoder takes: `text` is the exact end of `prompt`.

    encoders: the text encoders that did not read it; those of a bundle may have room for prompts of several lengths.
    """

    prompt: str
    text: str
    tokens: int
    encoders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """`ids`: (B, max_length) int64, each row begun, ended and padded. `dropped`: one entry per prompt that was cut."""

    ids: npt.NDArray[np.int64]
    dropped: tuple[DroppedText, ...]


class _Content(msgspec.Struct):
    content: str


class _Settings(msgspec.Struct):
    """The one key read from `tokenizer_config.json`; older files spell a token as an object."""

    pad_token: str | _Content | None = None


class PromptTokenizer:
    """A bundle's tokenizer; safe to share between threads.

    The same ids as transformers' CLIPTokenizer and T5TokenizerFast with `padding="max_length", truncation=True`.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        """Load `tokenizer.json`; where it states no padding, `tokenizer_config.json` beside it names the token.

        Raises:
            BundleError: the file is too large, no tokenizer, or without padding token.
        """
        self._path, self._max_length = path, max_length
        raw = _capped_bytes(path)
        with _usable(path):
            self._tokenizer = _loaded(raw)
            padding = self._tokenizer.padding
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._begin, self._end = _surrounding_ids(self._tokenizer)
        self._pad_id = int(padding["pad_id"]) if padding else _named_pad_id(self._tokenizer, path)
        if max_length <= len(self._begin) + len(self._end):
            raise BundleError(
                str(path), "room for text", got=max_length, expected=f"over {len(self._begin) + len(self._end)} tokens"
            )

    def tokenize(self, prompts: Sequence[str], *, strict: bool = False) -> Tokens:
        """Turn prompts into ids; what does not fit is dropped and reported.

        Raises:
            RequestError: no prompts; a prompt that is no string, holds half a surrogate pair or is over 64 KiB; with
                `strict`, a prompt that does not fit.
            BundleError: the tokenizer fails on a prompt.
        """
        if isinstance(prompts, str) or not prompts:
            got = "one string" if isinstance(prompts, str) else prompts
            raise RequestError("prompt", "prompts", got=got, expected="a list of one or more strings")
        for prompt in prompts:
            check_prompt(prompt)
        ids = np.full((len(prompts), self._max_length), self._pad_id, np.int64)
        dropped = []
        room = self._max_length - len(self._begin) - len(self._end)
        for row, prompt in zip(ids, prompts, strict=True):
            with _usable(self._path):
                encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
            kept = [*self._begin, *encoding.ids[:room], *self._end]
            row[: len(kept)] = kept
            if len(encoding.ids) > room:
                text = prompt[encoding.offsets[room][0] :]
                dropped.append(DroppedText(prompt, text, len(encoding.ids) - room))
        if dropped and strict:
            _refuse(dropped[0], room)
        return Tokens(ids, tuple(dropped))


def check_prompt(prompt: object) -> None:
    """Refuse what the tokenizer must not see: a wrong type, broken Unicode, megabytes.

    Raises:
        RequestError: as said.
    """
    if not isinstance(prompt, str):
        raise RequestError("prompt", "type", got=type(prompt).__name__, expected="str")
    if len(prompt) <= MAX_PROMPT_BYTES:
        try:
            size = len(prompt.encode("utf-8"))
        except UnicodeEncodeError as error:
            got = prompt[error.start : error.start + 1]
            remedy = "Decode the text with the encoding it was written in."
            raise RequestError(
                "prompt", f"half a surrogate pair at character {error.start}", got=got, remedy=remedy
            ) from error
    else:
        size = len(prompt)
    if size > MAX_PROMPT_BYTES:
        raise RequestError("prompt", "size", got=size, expected=f"at most {MAX_PROMPT_BYTES} bytes of UTF-8")


def _refuse(dropped: DroppedText, room: int) -> NoReturn:
    raise RequestError(
        "prompt",
        "too long",
        got=dropped.prompt[:80],
        expected=f"at most {room} tokens; {dropped.tokens} more begin at {dropped.text[:40]!r}",
        remedy="Shorten it, or allow long prompts to be cut.",
    )


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Name the file in whatever the library raises: its Rust code panics on some hostile files, with no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(str(path), f"not a usable tokenizer ({error})", remedy="Export the bundle again.") from error


def _loaded(raw: bytes) -> Tokenizer:
    from tokenizers import Tokenizer  # noqa: PLC0415 (loads when it is used)

    return Tokenizer.from_str(raw.decode("utf-8"))


def _capped_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise BundleError(str(path), f"cannot be read ({error.strerror})", remedy="Export the bundle again.") from error
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise BundleError(str(path), "size", got=f"over {MAX_TOKENIZER_BYTES}", expected="a smaller tokenizer")
    return raw


def _named_pad_id(tokenizer: Tokenizer, path: Path) -> int:
    """The id of the token the settings name; Stable Diffusion 1 pads with the end token, 2 with `!`."""
    settings = path.with_name("tokenizer_config.json")
    try:
        stated = msgspec.json.decode(_capped_bytes(settings), type=_Settings).pad_token
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(str(settings), f"not a tokenizer's settings ({error})") from error
    token = stated.content if isinstance(stated, _Content) else stated
    pad_id = None if token is None else tokenizer.token_to_id(token)
    if pad_id is None:
        raise BundleError(str(settings), "pad_token", got=token, expected="a token of the vocabulary")
    return int(pad_id)


def _surrounding_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    text = [index for index, special in enumerate(mask) if not special]
    return (encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]) if text else (encoding.ids, [])
