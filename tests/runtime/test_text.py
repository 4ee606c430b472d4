"""Prompts: the same ids as transformers' CLIPTokenizer, the text that was cut, the embedding cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from tandemrt.runtime import tokenizer
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Array, Binding, Session, Shape
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BundleError, ExecutionError, RequestError
from tandemrt.runtime.manifest import Manifest, TensorSpec, TextEncoding
from tandemrt.runtime.targets import parse_target
from tandemrt.runtime.text import DroppedText, PromptEncoder
from tandemrt.runtime.tokenizer import MAX_PROMPT_BYTES, PromptTokenizer

from .tiny_bundle import BOS, EOS, MAX_LENGTH, TEXT_WIDTH, resign, write_tiny_bundle

SHAPES_TOKENIZER = Path(__file__).parents[2] / "bench" / "shapes" / "weights" / "large" / "tokenizer"
SHAPES_LENGTH = 24

ORACLE = CLIPTokenizer.from_pretrained(SHAPES_TOKENIZER)


@pytest.fixture(scope="module")
def shapes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    ORACLE.save_pretrained(folder)
    return PromptTokenizer(folder / "tokenizer.json", SHAPES_LENGTH)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("text") / "bundle"
    write_tiny_bundle(folder)
    return Bundle.open(folder)


@pytest.fixture
def writable(tiny: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.path, tmp_path / "bundle"))


class CountingBinding:
    """A binding that counts its runs and may spoil its outputs."""

    def __init__(self, binding: Binding, spoil: Callable[[Array], object] | None) -> None:
        self.binding, self.spoil, self.runs = binding, spoil, 0
        self.inputs, self.outputs = binding.inputs, binding.outputs

    def run(self) -> None:
        self.runs += 1
        self.binding.run()
        if self.spoil:
            self.spoil(self.outputs["last_hidden_state"])


class CountingSession:
    """A session that counts the runs of its bindings."""

    def __init__(self, session: Session, spoil: Callable[[Array], object] | None = None) -> None:
        self.session, self.spoil = session, spoil
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.bindings: list[CountingBinding] = []

    @property
    def runs(self) -> int:
        return sum(binding.runs for binding in self.bindings)

    def bind(self, input_shapes: Mapping[str, Shape]) -> CountingBinding:
        self.bindings.append(CountingBinding(self.session.bind(input_shapes), self.spoil))
        return self.bindings[-1]

    def close(self) -> None:
        self.session.close()


@pytest.fixture(scope="module")
def text_session(tiny: Bundle) -> Session:
    return open_session(tiny.model_path("text_encoder"), parse_target("auto"))


@pytest.fixture
def session(text_session: Session) -> CountingSession:
    return CountingSession(text_session)


PROMPTS = (
    "a red circle left of a blue square on a white background",
    "",
    "   ",
    "A  RED\tCircle\n",
    "e\u0301 \u00e9 \u212b \uac01 \u1100\u1161\u11a8",
    "\U0001f389 it's 42% \u2014 don't",
    "red <|endoftext|> blue <|startoftext|>",
    "\x00\u200b\u202e",
    "\u0130stanbul \u01c5 \ufb01",
    "word " * 60,
    "x" * 200,
)


def oracle_ids(prompts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = ORACLE(prompts, padding="max_length", max_length=SHAPES_LENGTH, truncation=True).input_ids
    return ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(prompt: str, shapes_tokenizer: PromptTokenizer) -> None:
    tokens = shapes_tokenizer.tokenize([prompt])
    assert tokens.ids.dtype == np.int64
    assert tokens.ids.tolist() == oracle_ids([prompt])


@settings(max_examples=300)
@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=4))
def test_ids_are_those_of_transformers_for_any_text(prompts: list[str], shapes_tokenizer: PromptTokenizer) -> None:
    assert shapes_tokenizer.tokenize(prompts).ids.tolist() == oracle_ids(prompts)


def test_dropped_text_is_the_exact_end_of_the_prompt(tiny: Bundle) -> None:
    prompts_to_ids = PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH)
    prompt = "Red  BLUE red blue red \u00e9 \U0001f389 Red blue"  # é takes two tokens, the party popper four
    tokens = prompts_to_ids.tokenize(["red", prompt])
    assert tokens.dropped == (DroppedText(prompt, "\U0001f389 Red blue", 3),)
    kept = prompts_to_ids.tokenize([prompt.removesuffix("\U0001f389 Red blue")]).ids[0]
    assert kept.tolist()[:8] == tokens.ids[1].tolist()[:8]
    exact = "red blue red blue red blue red blue red blue"
    assert prompts_to_ids.tokenize([exact]).dropped == ()
    assert prompts_to_ids.tokenize([exact + "  , red"]).dropped[0].text == ", red"


@settings(max_examples=300)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=20, max_size=200))
@example(prompt="\u0344" * 60)
def test_dropped_text_is_always_an_end_with_all_that_was_lost(prompt: str, shapes_tokenizer: PromptTokenizer) -> None:
    count = len(ORACLE(prompt, add_special_tokens=False).input_ids)
    dropped = shapes_tokenizer.tokenize([prompt]).dropped
    if count <= SHAPES_LENGTH - 2:
        assert dropped == ()
        return
    (cut,) = dropped
    assert cut.prompt == prompt
    assert cut.text
    assert prompt.endswith(cut.text)
    assert cut.tokens == count - (SHAPES_LENGTH - 2)


def test_strict_refuses_what_would_be_cut(tiny: Bundle) -> None:
    prompts_to_ids = PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH)
    assert prompts_to_ids.tokenize(["red"], strict=True).dropped == ()
    with pytest.raises(RequestError, match=r"prompt: too long, got 'red red.*expected at most 10 tokens; 2 more begin"):
        prompts_to_ids.tokenize(["red", "red " * 12], strict=True)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"prompts, got \[\], expected a list of one or more strings"),
        ((), "one or more strings"),
        ("red", "prompts, got 'one string', expected a list"),
        (["red", None], "prompt: type, got 'NoneType', expected str"),
        ([b"red"], "type, got 'bytes'"),
        ([7], "type, got 'int'"),
        (["red \ud83d"], r"half a surrogate pair at character 4, got '\\ud83d'"),
        (["\udcff"], "half a surrogate pair at character 0"),
        (["\ude00\ud83d"], "half a surrogate pair"),
        (["x" * (MAX_PROMPT_BYTES + 1)], f"size, got {MAX_PROMPT_BYTES + 1}, expected at most {MAX_PROMPT_BYTES}"),
        (["\u00e9" * (MAX_PROMPT_BYTES // 2 + 1)], "prompt: size, got"),
        (["x" * (4 << 20)], "prompt: size, got"),
    ],
)
def test_prompts_the_tokenizer_must_not_see(prompts: Any, message: str, tiny: Bundle) -> None:
    prompts_to_ids = PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH)
    prompts_to_ids._tokenizer = None  # type: ignore[assignment]  # any use of it would be an AttributeError
    with pytest.raises(RequestError, match=message):
        prompts_to_ids.tokenize(prompts)


def test_a_prompt_of_exactly_the_limit_is_taken(tiny: Bundle) -> None:
    prompts_to_ids = PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH)
    tokens = prompts_to_ids.tokenize(["red " * (MAX_PROMPT_BYTES // 4)])
    assert tokens.dropped[0].tokens == MAX_PROMPT_BYTES // 4 - 10


@pytest.mark.parametrize("spelling", ["!", {"content": "!", "lstrip": False}])
def test_padding_is_what_the_settings_say(spelling: object, writable: Path) -> None:
    (writable / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"pad_token": spelling}))
    path = writable / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    ids = PromptTokenizer(path, MAX_LENGTH).tokenize(["red"]).ids[0].tolist()
    assert ids == [vocabulary[BOS], vocabulary["red</w>"], vocabulary[EOS]] + [vocabulary["!"]] * (MAX_LENGTH - 3)


def test_of_the_file_s_own_truncation_and_padding_only_the_padding_id_counts(writable: Path) -> None:
    """Exporters store transformers' padding id there; Stable Diffusion 2's settings alone would name another token."""
    path = writable / "tokenizer" / "tokenizer.json"
    prompts = ["red blue", "red " * 20]
    plain = PromptTokenizer(path, MAX_LENGTH).tokenize(prompts)
    edited = json.loads(path.read_text())
    edited["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edited["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 7, "pad_type_id": 0,
        "pad_token": "x",
    }  # fmt: skip
    path.write_text(json.dumps(edited))
    changed = PromptTokenizer(path, MAX_LENGTH).tokenize(prompts)
    assert changed.ids[0].tolist() == [*plain.ids[0, :4].tolist(), *[7] * (MAX_LENGTH - 4)]
    np.testing.assert_array_equal(changed.ids[1], plain.ids[1])
    assert changed.dropped == plain.dropped


def edit_tokenizer(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


HOSTILE_TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda content: content.pop("model"),
    "a merge of unknown tokens": lambda content: content["model"]["merges"].append(["zz", "yy"]),
    # These two make the library's Rust code panic, when it loads the file and when it first encodes.
    "a slice out of range": lambda content: content["model"].update(continuing_subword_prefix="(?:"),
    "an empty expression": lambda content: content["normalizer"]["normalizers"][1].update(pattern={"Regex": ""}),
    "a broken expression": lambda content: content["normalizer"]["normalizers"][1].update(pattern={"Regex": "("}),
}


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_hostile_tokenizers_are_refused(name: str, writable: Path) -> None:
    path = writable / "tokenizer" / "tokenizer.json"
    edit_tokenizer(path, HOSTILE_TOKENIZERS[name])
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a usable tokenizer"):
        PromptTokenizer(path, MAX_LENGTH).tokenize(["a red \u00e9t\u00e9 \U0001f389 b"])


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10_000, b"\xff\xfe", b"\x80\x04N."])
def test_what_is_no_tokenizer_is_refused(content: bytes, writable: Path) -> None:
    path = writable / "tokenizer" / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a usable tokenizer"):
        PromptTokenizer(path, MAX_LENGTH)
    path.unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot be read"):
        PromptTokenizer(path, MAX_LENGTH)


def test_an_oversized_tokenizer_is_not_parsed(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tiny.tokenizer_path("text_encoder").stat().st_size
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER_BYTES", size)
    PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH)
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER_BYTES", size - 1)
    with pytest.raises(BundleError, match=rf"tokenizer\.json: size, got 'over {size - 1}'"):
        PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pad_token": null}', '{"pad_token": "zzz"}', '{"pad_token": 3}'])
def test_a_padding_token_is_never_guessed(content: str, writable: Path) -> None:
    (writable / "tokenizer" / "tokenizer_config.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: "):
        PromptTokenizer(writable / "tokenizer" / "tokenizer.json", MAX_LENGTH)


def test_a_length_without_room_is_refused(tiny: Bundle) -> None:
    assert PromptTokenizer(tiny.tokenizer_path("text_encoder"), 3).tokenize(["red red"]).dropped[0].text == "red"
    with pytest.raises(BundleError, match="room for text, got 2, expected over 2 tokens"):
        PromptTokenizer(tiny.tokenizer_path("text_encoder"), 2)


def test_embeddings_are_the_text_encoder_s(tiny: Bundle, session: CountingSession) -> None:
    encoder = PromptEncoder(tiny, "text_encoder", session)
    prompts = ["a red circle", "", "blue " * 30]
    embeddings, dropped = encoder.encode(prompts)
    assert embeddings.pooled is None
    embeddings = embeddings.hidden
    assert embeddings.shape == (3, MAX_LENGTH, TEXT_WIDTH)
    assert embeddings.dtype == np.float32
    assert [cut.prompt for cut in dropped] == [prompts[2]]
    ids = encoder.tokenize(prompts).ids
    batch = session.session.bind({"input_ids": ids.shape})
    batch.inputs["input_ids"][...] = ids
    batch.run()
    np.testing.assert_allclose(embeddings, batch.outputs["last_hidden_state"], rtol=1e-5, atol=1e-6)
    assert (embeddings[0] != embeddings[1]).any()


def test_the_cache_changes_no_bit(tiny: Bundle, session: CountingSession) -> None:
    cached = PromptEncoder(tiny, "text_encoder", session)
    uncached = PromptEncoder(tiny, "text_encoder", session, cached_prompts=0)
    prompts = ["a red circle", "", "a blue square", "a red circle"]
    first, _ = cached.encode(prompts)
    assert session.runs == 3
    second, _ = cached.encode(prompts)
    assert session.runs == 3
    plain, _ = uncached.encode(prompts)
    assert session.runs == 7
    np.testing.assert_array_equal(first.hidden, second.hidden)
    np.testing.assert_array_equal(first.hidden, plain.hidden)
    np.testing.assert_array_equal(first.hidden[:1], uncached.encode(prompts[:1])[0].hidden)


def test_a_hit_still_reports_what_was_dropped(tiny: Bundle, session: CountingSession) -> None:
    encoder = PromptEncoder(tiny, "text_encoder", session)
    prompt = "red " * 12
    assert encoder.encode([prompt])[1] == encoder.encode([prompt])[1] == (DroppedText(prompt, "red red ", 2),)
    assert session.runs == 1
    with pytest.raises(RequestError, match="too long"):
        encoder.encode([prompt], strict=True)


def test_what_the_caller_does_to_embeddings_stays_with_the_caller(tiny: Bundle, session: CountingSession) -> None:
    encoder = PromptEncoder(tiny, "text_encoder", session)
    first, _ = encoder.encode(["red"])
    kept = first.hidden.copy()
    first.hidden.fill(0)
    np.testing.assert_array_equal(encoder.encode(["red"])[0].hidden, kept)


def test_the_least_recently_used_embedding_goes_first(tiny: Bundle, session: CountingSession) -> None:
    encoder = PromptEncoder(tiny, "text_encoder", session, cached_prompts=2)
    for prompt, runs in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4), ("A ", 4), ("c", 5)):
        encoder.encode([prompt])
        assert session.runs == runs, prompt


def test_threads_get_what_a_serial_run_gets(tiny: Bundle, session: CountingSession) -> None:
    prompts = [f"a {color} {shape}" for color in ("red", "blue", "x") for shape in "abcdefgh"]
    serial = [PromptEncoder(tiny, "text_encoder", session).encode([prompt])[0].hidden for prompt in prompts]
    encoder = PromptEncoder(tiny, "text_encoder", session, cached_prompts=5)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda prompt: encoder.encode([prompt])[0].hidden, prompts * 8))
    for expected, result in zip(serial * 8, results, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_values_that_are_not_finite_are_caught(tiny: Bundle, session: CountingSession) -> None:
    for bad in (np.nan, np.inf):
        spoiled = CountingSession(session.session, lambda output, bad=bad: output.__setitem__((0, 1, 2), bad))
        encoder = PromptEncoder(tiny, "text_encoder", spoiled)
        for _ in range(2):
            with pytest.raises(ExecutionError, match="text_encoder: NaN or Inf in last_hidden_state"):
                encoder.encode(["red"])
        assert spoiled.runs == 2


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        (
            {"text_encoder": TextEncoding(max_length=12, width=7)},
            r"outputs, got .*expected last_hidden_state \(1, 12, 7",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_the_encoder_is_refused(
    encoders: dict[str, TextEncoding], message: str, writable: Path, session: CountingSession
) -> None:
    def changed(manifest: Manifest) -> Manifest:
        return msgspec.structs.replace(manifest, text=msgspec.structs.replace(manifest.text, encoders=encoders))

    resign(writable, changed)
    with pytest.raises(BundleError, match=message):
        PromptEncoder(Bundle.open(writable), "text_encoder", session).encode(["red"])


def test_special_tokens_in_a_prompt_are_the_tokens_themselves(tiny: Bundle) -> None:
    ids = PromptTokenizer(tiny.tokenizer_path("text_encoder"), MAX_LENGTH).tokenize([f"red {EOS} red"]).ids[0].tolist()
    assert ids[2] == ids[4]
    assert ids[1] == ids[3]
